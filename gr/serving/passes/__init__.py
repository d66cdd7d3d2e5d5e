"""Shape-clean forward passes for torch.export, one file a kind of model. They are read when a package is made."""
