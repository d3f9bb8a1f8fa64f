"""`megascale dryrun`: the training step of one rank of a job of any size, without the job and without memory."""
