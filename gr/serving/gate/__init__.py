"""How far a cheaper form of a model is from the model: measured before anything is written."""
