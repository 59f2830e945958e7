"""Runs: one Python file each, its command and its measured result on top."""
