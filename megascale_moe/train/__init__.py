"""Training: a rank's step (`trainer`), the loop around it, the job around the ranks, metrics and the timeline."""
