"""Speed, memory and accuracy of fastpref and of its peers, on the same inputs.

workloads.py   heads and batches to measure on, and their inputs
peers.py       one function a way to compute the same DPO loss
measure.py     time (interleaved), peak memory, error against float64
report.py      table, charts, comparison with an earlier result
"""
