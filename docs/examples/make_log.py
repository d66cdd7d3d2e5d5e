"""Writes log.csv, users.csv and candidates.parquet for the pages of docs/: a shop's interactions with ids of its own.

    python docs/examples/make_log.py

400 customers and 120 articles in ten aisles; a customer mostly stays in an aisle, and walks on to the next one.
"""

import numpy as np
import pandas as pd

stream = np.random.default_rng(0)
rows = []
for customer in range(400):
    aisle, time = stream.integers(10), 1_700_000_000 + stream.integers(10**7)
    for _ in range(stream.integers(5, 40)):
        aisle = (aisle + (stream.random() < 0.2)) % 10
        time += int(stream.integers(60, 10**5))
        bought = int(stream.random() < 0.15 + 0.05 * (aisle % 3))
        rows.append((f"customer-{customer:03}", f"SKU/{aisle}/{stream.integers(12)}", time, bought, f"aisle {aisle}"))
log = pd.DataFrame(rows, columns=["customer", "sku", "time", "bought", "aisle"]).sort_values("time")
log["time"] = pd.to_datetime(log["time"], unit="s")
log.to_csv("log.csv", index=False)
pd.DataFrame({"user_id": ["customer-007", "customer-042"], "k": [3, 5]}).to_parquet("users.parquet")
log.tail(50).drop(columns="bought").to_parquet("candidates.parquet", index=False)
