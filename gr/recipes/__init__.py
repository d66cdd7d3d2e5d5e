"""The kinds of experiments: what each reads, trains, evaluates and reports. gr.experiment puts a run together."""
