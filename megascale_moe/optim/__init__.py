"""From gradients to new weights: synchronisation over replicas, sharded AdamW, learning-rate schedules."""
