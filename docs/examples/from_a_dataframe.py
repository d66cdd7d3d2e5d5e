"""From a DataFrame to recommendations: `python docs/examples/from_a_dataframe.py`, after make_log.py."""

import pandas as pd

import gr

log = pd.read_csv("log.csv", parse_dates=["time"])
gr.prepare_events(log, "data/frame", user="customer", item="sku", time="time", force=True)
config = gr.load_config("retrieval/hstu", ["data.path=data/frame", "run_dir=runs/frame", "trainer.epochs=8"])
gr.train(config)

model = gr.load("runs/frame")
history = log[log.customer == "customer-007"]
times = history.time.astype("datetime64[s]").astype(int)
(best,) = model.recommend([history.sku.tolist()], k=5, times=[times.tolist()])
for item, score in best:
    print(f"{item}  {score:.2f}")
