"""A saved ranking model, asked in the log's own ids. B rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr.data.candidate_rows import CandidateRows
from gr.data.collate_ranking import RankingCollate
from gr.data.dataset import Dataset, check_alike
from gr.data.vocabulary import Vocabulary
from gr.models.saved import Saved, as_table
from gr.models.sequence_ranking import predictions
from gr.schema import USER_COLUMN, HistoryColumns


class SavedRanking(Saved):
    """Predicts what users whose histories are in a data folder will do with items."""

    @torch.no_grad()
    def score(self, rows: Any, data: str | Path) -> dict[str, np.ndarray]:
        """The prediction of each task for each row, float32 [B]: probabilities of actions, or numbers.

        rows: a table (pandas, polars, pyarrow) with the columns of CandidateRows. data: the folder with the histories
        of its users. NaN where an item is not known. Raises DataError.
        """
        dataset = Dataset.open(data)
        fields = ("item_cardinality", *HistoryColumns.model_fields)
        check_alike(self.schema, self.folder, self.config.load_schema(dataset.path), dataset.path, fields)
        users = Vocabulary.open(dataset.path, dataset.schema, USER_COLUMN)
        collate = RankingCollate(self.schema, self.config.data, self.config.task)  # type: ignore[attr-defined]
        batch, known_B = CandidateRows(dataset, collate, users, self.vocabularies).batch(as_table(rows))
        tasks = collate.task.tasks
        columns = predictions(self.model(batch.to(self.device)), tasks)
        return {task.name: np.where(known_B, values_B, np.nan) for task, values_B in zip(tasks, columns, strict=True)}
