"""The verbs of each kind of model: how a request is encoded, run and answered."""
