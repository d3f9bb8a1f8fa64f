"""Programs that measure: `megascale bench overlap`, `convergence` and `profile`. Only the command line imports them."""
