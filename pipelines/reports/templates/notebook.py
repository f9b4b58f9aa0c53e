import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Meteora's ledger")

with app.setup:
    from pathlib import Path

    import marimo as mo
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from store.ledger import Ledger

    HOME = "~/.meteora"  # what `meteora notebook --home` was given
    ledger = Ledger(Path(HOME).expanduser())
    ledger.ingest(deadline_seconds=1.0)
    plt.rcParams["text.parse_math"] = False  # names are text
    COLOURS = {"fused": "#1f5f8b", "oracle": "#c05a1c", "base": "#8a8a8a"}

    def ask(sql):
        """The rows of one SELECT, each by its columns' names."""
        return ledger.query(sql).dicts

    def answered(question, *parts):
        """A question as a heading, and below it what answers it."""
        return mo.vstack([mo.md(f"## {question}"), *parts])

    def table(rows):
        """The rows with numbers of four digits behind the point, or a word where there are none.

        Of a p-value, whose column is called `p_…`, the first two digits count.
        """
        if not rows:
            return mo.md("*Nothing is recorded.*")
        numbers = [name for name, value in rows[0].items() if isinstance(value, float)]
        return mo.ui.table(
            rows,
            selection=None,
            format_mapping={
                name: "{:.2g}" if name.startswith("p_") else "{:.4f}" for name in numbers
            },
        )

    def plot_intervals(rows, unit):
        """A point with its interval for each row, on a line for each task."""
        if not rows:
            return mo.md("")
        lines = list(dict.fromkeys(row["task"] for row in rows))
        systems = list(dict.fromkeys(row.get("system", "") for row in rows))
        figure, axes = plt.subplots(figsize=(8, 0.5 * len(lines) + 1.5), layout="constrained")
        for number, system in enumerate(systems):
            own = [row for row in rows if row.get("system", "") == system]
            places = [
                lines.index(row["task"]) + 0.18 * (number - (len(systems) - 1) / 2) for row in own
            ]
            colour = COLOURS.get(system, "black")
            axes.hlines(places, [row["low"] for row in own], [row["high"] for row in own], colour)
            axes.plot([row["value"] for row in own], places, "o", color=colour, label=system)
        if len(systems) > 1:
            figure.legend(loc="outside upper right", ncols=len(systems), frameon=False)
        axes.axvline(0, color="lightgrey", zorder=0)
        axes.set_yticks(range(len(lines)), lines)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        return figure

    def plot_lines(lines, xlabel, ylabel):
        """A line of (x, y) for each name."""
        if not any(lines.values()):
            return mo.md("")
        figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.05))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        return figure


@app.cell(hide_code=True)
def _():
    mo.md("""
    # What the ledger says

    Each answer comes from the query of its cell. Change a query, and its answer is made again.
    `FROM dictionary` says what each column of each view means; `meteora sql --examples` has more
    questions.
    """)
    return


@app.cell
def _():
    found = ask("""
        SELECT id, short(id) || ', ' || router || ', ' || count(DISTINCT name) || ' experts, '
               || strftime(recorded_at, '%Y-%m-%d %H:%M') AS name
        FROM routers JOIN artifacts USING (id) JOIN experts USING (fused_id)
        WHERE id IN (SELECT subject_id FROM leaderboard)
        GROUP BY id, router, recorded_at
        ORDER BY list_position(['gate', 'prompt'], router) NULLS LAST, recorded_at DESC
    """)
    mo.stop(not found, mo.md("No model was measured yet: `meteora run quickstart` makes one."))
    names = {row["name"]: row["id"] for row in found}
    model = mo.ui.dropdown(names, value=next(iter(names)), label="model")
    model
    return (model,)


@app.cell
def _():
    _rows = ask("""
        SELECT short(subject_id) AS model, router, num_tasks AS tasks, round(value, 3) AS score,
               round(base_value, 3) AS base, round(oracle_value, 3) AS oracle
        FROM means ORDER BY value DESC, subject_id
    """)
    answered("Which models are there, and how good are they on the mean?", table(_rows))
    return


@app.cell
def _(model):
    _rows = ask(f"""
        SELECT task, metric, system, value, low, high, num_samples
        FROM latest_standings
        WHERE router_id = '{model.value}' AND system IN ('fused', 'oracle', 'base')
        ORDER BY task, metric, system
    """)
    answered(
        "How well does it do each task, beside the base and the right adapter alone?",
        plot_intervals(_rows, "score, with its 95 % interval"),
        table(_rows),
    )
    return


@app.cell
def _(model):
    _rows = ask(f"""
        SELECT task, metric, difference AS value, low, high, p_holm, num_samples
        FROM latest_comparisons
        WHERE subject_id = '{model.value}' AND other = 'oracle'
        ORDER BY value
    """)
    answered(
        "What does it lose against the right adapter alone?",
        mo.md("Left of zero it is worse. `p_holm` below 0.05 is beyond chance."),
        plot_intervals(_rows, "fused minus oracle, with its 95 % interval"),
        table(_rows),
    )
    return


@app.cell
def _(model):
    _rows = ask(f"""
        SELECT task, system, turn, value, num_conversations, computed_tokens, seconds
        FROM conversation_turns SEMI JOIN latest_standings USING (router_id, system, score_id)
        WHERE router_id = '{model.value}' ORDER BY task, system, turn
    """)
    _lines = {}
    for _row in _rows:
        _lines.setdefault(f"{_row['system']}, {_row['task']}", []).append(
            (_row["turn"], _row["value"])
        )
    _plot = plot_lines(_lines, "turn", "mean score")
    answered("How does it follow a conversation, turn by turn?", _plot, table(_rows))
    return


@app.cell
def _(model):
    _rows = ask(f"""
        SELECT truth, chosen,
               sum(num_tokens) / sum(sum(num_tokens)) OVER (PARTITION BY truth) AS share
        FROM routing_counts WHERE router_id = '{model.value}'
        GROUP BY truth, chosen ORDER BY truth, chosen
    """)
    _truths = list(dict.fromkeys(_row["truth"] for _row in _rows))
    _chosen = _truths + [
        c for c in dict.fromkeys(_row["chosen"] for _row in _rows) if c not in _truths
    ]
    _shares = {(_row["truth"], _row["chosen"]): _row["share"] for _row in _rows}
    _figure, _axes = plt.subplots(figsize=(7, 0.4 * len(_truths) + 1.6), layout="constrained")
    _axes.imshow(
        [[_shares.get((t, c), 0) for c in _chosen] for t in _truths], cmap="Blues", vmin=0, vmax=1
    )
    for (_truth, _choice), _share in _shares.items():
        _at = _chosen.index(_choice), _truths.index(_truth)
        _axes.text(
            *_at,
            f"{_share:.2f}",
            ha="center",
            va="center",
            color="white" if _share > 0.5 else "black",
        )
    _axes.set_xticks(range(len(_chosen)), _chosen, rotation=45, ha="right")
    _axes.set_yticks(range(len(_truths)), _truths)
    _axes.set_xlabel("is sent to")
    _axes.set_ylabel("a token of")
    answered("Whose tokens are sent to whom, over all layers?", _figure if _rows else table(_rows))
    return


@app.cell
def _(model):
    _rows = ask(f"""
        SELECT layer, round(sum(accuracy * num_tokens) / sum(num_tokens), 4) AS accuracy
        FROM routing WHERE router_id = '{model.value}' AND num_tokens > 0
        GROUP BY layer ORDER BY layer
    """)
    _plot = plot_lines(
        {"own expert": [(_row["layer"], _row["accuracy"]) for _row in _rows]},
        "layer",
        "share of tokens",
    )
    answered("In which layers do tokens reach their own expert?", _plot, table(_rows))
    return


@app.cell
def _(model):
    _rows = ask(f"""
        SELECT depth, kind, source, revision, licence, weights_sha256
        FROM lineage WHERE artifact_id = '{model.value}' AND relation = 'made from'
        ORDER BY depth, kind, source
    """)
    answered("What is it made from, down to commit, licence and hash?", table(_rows))
    return


@app.cell
def _(model):
    _times = ask(f"""
        SELECT stage, round(run_stages.wall_seconds, 1) AS seconds
        FROM artifacts JOIN run_stages USING (run_id) WHERE id = '{model.value}' ORDER BY position
    """)
    _speeds = ask(f"""
        SELECT phase, round(fused_tokens_per_second) AS tokens_per_second,
               round(ratio, 2) AS times_base, round(added_bytes / 1e6, 1) AS added_mb, device
        FROM speeds WHERE subject_id = '{model.value}'
        QUALIFY id = arg_max(id, (recorded_at, id)) OVER () ORDER BY phase
    """)
    _text = "The stages of its run; prefill and decoding, if `benchmark: {speed: {}}` asked for it."
    answered(
        "What did it cost, and what does it cost?", mo.md(_text), table(_times), table(_speeds)
    )
    return


@app.cell
def _():
    _rows = ask("""
        SELECT recipe_name, date_trunc('second', recorded_at) AS made_at,
               short(subject_id) AS model, round(value, 3) AS score, num_tasks AS tasks
        FROM means JOIN artifacts ON id = subject_id JOIN runs USING (run_id)
        ORDER BY recipe_name, made_at, model
    """)
    answered("How did each recipe's models change over time?", table(_rows))
    return


@app.cell
def _():
    _rows = ask("""
        SELECT name, verdict, repo_id, licence, codes, messages
        FROM adapters ORDER BY verdict DESC, name
    """)
    answered("Which adapters were judged, and how?", table(_rows))
    return


@app.cell
def _():
    _rows = ask(
        "SELECT recorded_at, recipe_name, stage, subject, error, message FROM failures LIMIT 20"
    )
    answered("What went wrong lately?", table(_rows))
    return


if __name__ == "__main__":
    app.run()
