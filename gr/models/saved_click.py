"""A saved click model, asked in the log's own ids. B rows."""

from functools import cached_property
from typing import Any

import numpy as np
import torch

from gr.data.click_rows import ClickRows
from gr.data.collate_tabular import tabular_batch
from gr.models.saved import Saved, as_table


class SavedClick(Saved):
    """Predicts the label of rows that have the columns of the training data."""

    @torch.no_grad()
    def score(self, rows: Any) -> np.ndarray:
        """The probability of the label for each row of a table (pandas, polars, pyarrow), float32 [B].

        Raises DataError for a missing column, or a value that is no finite number.
        """
        read, _ = self.rows.read(as_table(rows))
        batch = tabular_batch(read, self.schema)
        count = len(batch.labels_B)
        batch = batch.padded(max(count, 1), [column.hots for column in self.schema.sparse]).to(self.device)
        return self.model(batch.dense_BN, batch.sparse).float().sigmoid()[:count].cpu().numpy()

    @cached_property
    def rows(self) -> ClickRows:
        """Reads the columns of the training data."""
        return ClickRows(self.schema, self.vocabularies)
