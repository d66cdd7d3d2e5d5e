"""A folder of user histories read back as plain Python values."""

from pathlib import Path

from gr.data.dataset import Dataset


def histories_by_user(folder: Path) -> dict[int, dict[str, list]]:
    """Columns by name for each user id: a list of events, or one value where the column has one a user."""
    data = Dataset.open(folder)
    users = {}
    for index in range(len(data.row_groups)):
        names = [name for name in (*data.schema.event_columns, *data.schema.user_columns) if name != "item_ids"]
        group = data.read_row_group(index, ["user_id", *names])
        for row, user_id in enumerate(group.columns["user_id"].tolist()):
            events = slice(group.offsets[row], group.offsets[row + 1])
            flat = {name: group.columns[name][row].item() for name in data.schema.user_columns}
            users[user_id] = {n: group.columns[n][events].tolist() for n in data.schema.event_columns} | flat
    return users
