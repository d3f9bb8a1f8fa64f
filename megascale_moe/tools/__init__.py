"""Programs about training: verify, report, dryrun, plan, doctor, validation of published rows.

They may import everything but the measuring programs (`bench`); only the command line imports them.
"""
