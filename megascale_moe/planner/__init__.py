"""Prices of lists for clusters that are not there; opens no process group."""
