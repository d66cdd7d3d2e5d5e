"""A MetricsWriter that keeps what it is given."""


class Writer:
    def __init__(self) -> None:
        self.records: list[tuple[int, str, dict[str, float]]] = []

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        self.records.append((step, kind, dict(values)))
