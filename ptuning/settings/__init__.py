"""The tables of an experiment file, in the order in which data flows. `ptuning.config` joins them into an experiment."""
