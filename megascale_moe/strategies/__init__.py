"""Strategies: how a block becomes a list of operators on a given layout. One file each.

A strategy is local sizes plus the place where communication operators go. On one rank the same lists come out with
the communication gone.
"""
