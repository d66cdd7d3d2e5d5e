"""What can be asked of each kind of model: a request encoded, run and answered."""
