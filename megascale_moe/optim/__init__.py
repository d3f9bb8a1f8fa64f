"""From gradients to new weights: synchronisation over replicas, optimizer rules on shards, learning-rate schedules."""
