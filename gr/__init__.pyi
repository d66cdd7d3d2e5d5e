from gr.api import embed as embed
from gr.api import evaluate as evaluate
from gr.api import plan as plan
from gr.api import predict as predict
from gr.api import prepare_events as prepare_events
from gr.api import recommend as recommend
from gr.api import train as train
from gr.config import load_config as load_config
from gr.data.raw_ids import raw_ids as raw_ids
from gr.models.saved import load as load

__version__: str
