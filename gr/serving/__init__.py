"""Answers requests with a trained model: packages, their versions, the engine and its server.

Importing it needs torch and fbgemm_gpu only; what makes a package from a checkpoint is in modules of its own.
"""

from gr.serving.engine import Answer, Engine
from gr.serving.servable import Encoded, RequestError, Servable, TensorSpec

__all__ = ["Answer", "Encoded", "Engine", "RequestError", "Servable", "TensorSpec"]
