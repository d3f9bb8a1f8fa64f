"""Ranks and what travels between them: the mesh, its axes, and collectives that finish later."""
