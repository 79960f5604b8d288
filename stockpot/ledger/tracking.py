"""The ledger, on MLflow: experiment = model name, parent run = sweep, child run = trial or soup, LoggedModel = ingredient.

A trial id is found within its experiment, so a trial finished for one sweep is finished for every sweep of that model. An ingredient
exists once its LoggedModel is READY and carries the tag `stockpot.ingredient`: that tag is written last. Every run carries `stockpot.kind`
(sweep, trial, soup) and `stockpot.sweep`.
"""

import json
import os
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4
