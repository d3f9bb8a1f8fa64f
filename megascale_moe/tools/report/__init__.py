"""`megascale report`: one HTML page that says what a run did and where its time and memory went.

Three steps, each usable without the next: `train.timeline` turns lists of operators into a document (timeline.json,
written by rank 0 at the end of a run), `run` reads a run folder and refuses what is damaged, `page` makes the page of
both. So anybody who has the folder can regenerate the page anywhere, without the ranks that trained.
"""
