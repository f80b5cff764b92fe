"""`qkv bench`: ours beside other libraries: results checked first, calls timed in turn, beside the machine's rates.

cases       a call of attention, its inputs, and the float64 answer; a row: a case, its peers, its targets
gradients   the float64 answer of a backward pass
peers/      the libraries that take part
race        turns, rounds, ratios and verdicts
budget      the seconds of a run
machine     the processor, its caches, its rates
memory      what a call takes beyond its inputs and output
report      the table for people, and the run as data
results     the files under benchmarks/results
readme      the table and the chart of README
calls, training, caches/, models, sweep     what is measured
session     a run over calls or training
"""
