# Databricks notebook source
# MAGIC %md
# MAGIC # A first recommender, from clicks to a champion
# MAGIC
# MAGIC The main job step by step on the sample data: clicks of a fashion shop, April to August 2008.
# MAGIC Each cell calls one function of the package and leaves one manifest in the run folder.
# MAGIC
# MAGIC **Question**: given the clicks of a session so far, which item is clicked next, and is a model
# MAGIC better at it than counting?

# COMMAND ----------

dbutils.widgets.text("config", "eshop_clothing")
dbutils.widgets.text("run_dir", "runs/first_model")
dbutils.widgets.text("overrides", "")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Config
# MAGIC One YAML decides everything. `recsys configs template` prints a commented one for your own table.

# COMMAND ----------

from pathlib import Path

from recsys.opened import start_run

run = start_run(
    dbutils.widgets.get("config"),
    dbutils.widgets.get("overrides").split(),
    Path(dbutils.widgets.get("run_dir")),
)
display([(feature.name, feature.side, feature.kind) for feature in run.config.features])

# COMMAND ----------

# MAGIC %md
# MAGIC ## Prepare
# MAGIC Spark cleans the clicks, splits them by time and writes examples whose history lies strictly before
# MAGIC their label. The report says what was dropped, and why.

# COMMAND ----------

run.do("prepare")

from recsys.artifacts import EvaluationReport, PreparedData, TrainedModel

data = run.load("prepare", PreparedData)
display(data.cleaning)
display({"train": data.train, "validation": data.validation, "test": data.test})

# COMMAND ----------

# MAGIC %md
# MAGIC ## Fit
# MAGIC Two towers, a softmax over the corpus, the best epoch on the validation window.

# COMMAND ----------

run.do("fit")

import matplotlib.pyplot as plt

model = run.load("fit", TrainedModel)
figure, axes = plt.subplots()
axes.plot(range(1, len(model.curves[model.monitor]) + 1), model.curves[model.monitor], marker="o")
axes.axvline(model.best_epoch, linestyle="--")
axes.set(xlabel="epoch", ylabel=f"validation {model.monitor}")
display(figure)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Evaluate
# MAGIC The whole corpus is ranked for every test click, for the model and for each baseline alike.

# COMMAND ----------

if "rank" in run.steps:  # with a `ranking` section a second stage orders what the towers find
    run.do("rank")
run.do("evaluate")

report = run.load("evaluate", EvaluationReport)
metric = run.config.registry.gate.metric
scores = {"model": report.model[metric]} | {
    name: metrics[metric] for name, metrics in report.baselines.items()
}
figure, axes = plt.subplots()
axes.barh(list(scores), [score.value for score in scores.values()])
axes.set(xlabel=f"test {metric}")
display(figure)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Export, register, promote, score
# MAGIC The towers become a SavedModel with its index, read back in a fresh process; the version becomes the
# MAGIC champion only if it beats counting and the present champion; then Spark scores all users with it.

# COMMAND ----------

for step in ("export", "register", "promote", "score"):
    run.do(step)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Conclusion
# MAGIC The summary shows metrics beside the baselines, the index, the version, and three users with what is
# MAGIC recommended to them.

# COMMAND ----------

print(run.summary())
run.finish()
