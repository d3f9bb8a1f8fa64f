"""Prices of lists for clusters that you do not have; opens no process group."""
