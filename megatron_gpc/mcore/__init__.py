"""The only folder that imports megatron: processes, model, update, checkpoint, weights."""

import logging
import warnings

# What megatron-core says at every start if its optional parts are absent; the README says it
# once.  Here, because this runs before the first import of megatron.
warnings.filterwarnings("ignore", module=r"megatron\.core.*")
warnings.filterwarnings("ignore", module=r"torch\.distributed.*", category=FutureWarning)
logging.getLogger("megatron.core").setLevel(logging.ERROR)
