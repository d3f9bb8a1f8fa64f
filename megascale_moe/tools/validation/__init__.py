"""`megascale plan --validate`: predicted step times beside published ones, row by row."""
