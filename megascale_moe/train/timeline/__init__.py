"""The timeline that a run leaves (timeline.json): when each operator of a step ran, and how much memory was alive.

`record` makes the document from a step's list and its measured events, `watch` observes memory while a step runs.
`megascale report` and the planner's pages read it.
"""
