"""The table of commands. Targets are ``"module:attribute"`` strings: nothing is imported before its command runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    ``root`` is the dataclass of its configuration, ``entry`` a function of such an object that returns the exit code.
    A name may be two words. The primary YAML is ``configs/<name>.yaml``, with ``_`` between words. ``sweep``, where
    ``-m`` is allowed, is a function of the configurations of all runs, each with the overrides that tell it from the
    others. A carrier takes another command line after its own keys; its entry gets that, too.
    """

    name: str
    comment: str
    root: str
    entry: str
    sweep: str | None = None
    is_carrier: bool = False

    @property
    def config_name(self) -> str:
        """Of the primary YAML."""
        return self.name.replace(" ", "_")


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "serve",
            "serve a model behind an OpenAI-compatible endpoint, prefill and decode apart, on Ray",
            "cluster.config:ServeConfig",
            "cluster.launch:serve",
        ),
        Command(
            "generate",
            "continue a prompt or ask about a document, here and now, without Ray",
            "longctx.cli.generate_config:GenerateCommandConfig",
            "longctx.cli.generate:generate",
        ),
        Command(
            "eval",
            "measure how much of its context a model uses: pass keys, threads, aggregation, perplexity",
            "longctx.cli.eval_config:EvalCommandConfig",
            "longctx.cli.eval:evaluate",
        ),
        Command(
            "bench",
            "measure how fast this machine computes prompts and tokens, for longctx plan cluster",
            "longctx.cli.bench_config:BenchCommandConfig",
            "longctx.cli.bench:bench",
        ),
        Command(
            "status",
            "show what runs where: workers, pages, queue",
            "cluster.config:StatusConfig",
            "cluster.status:status",
        ),
        Command(
            "worker add",
            "start one more worker of a deployment in a Ray cluster, while it serves",
            "cluster.config:WorkerAddConfig",
            "cluster.worker_commands:add",
        ),
        Command(
            "worker drain",
            "let a worker finish what it has, and end or restart it, while the deployment serves",
            "cluster.config:WorkerDrainConfig",
            "cluster.worker_commands:drain",
        ),
        Command(
            "keys add",
            "make an API key, keep its hash in server.api_key_file and print it once",
            "cluster.config:KeyConfig",
            "cluster.key_file:add_key",
        ),
        Command(
            "keys remove",
            "take an API key out of server.api_key_file; a server that runs notices within a second",
            "cluster.config:KeyConfig",
            "cluster.key_file:remove_key",
        ),
        Command(
            "keys list",
            "list the names of the API keys in server.api_key_file",
            "cluster.config:KeyListConfig",
            "cluster.key_file:list_keys",
        ),
        Command(
            "train",
            "train or fine-tune a model over data and sequence parallel ranks, here or on a Ray cluster",
            "longctx.training.config:TrainConfig",
            "longctx.cli.train:train",
            sweep="longctx.cli.train:sweep",
        ),
        Command(
            "submit",
            "run a longctx command as a job of a Ray cluster: longctx submit train key=value ...",
            "cluster.config:SubmitCommandConfig",
            "cluster.jobs:submit",
            is_carrier=True,
        ),
        Command(
            "job status",
            "show the state of a job that was submitted",
            "cluster.config:JobConfig",
            "cluster.jobs:show_status",
        ),
        Command(
            "job logs",
            "show what a job prints",
            "cluster.config:JobLogsConfig",
            "cluster.jobs:show_logs",
        ),
        Command(
            "job stop",
            "let a job save its state and end",
            "cluster.config:JobConfig",
            "cluster.jobs:stop",
        ),
        Command(
            "job list",
            "list the jobs of a Ray cluster",
            "cluster.config:JobListConfig",
            "cluster.jobs:list_jobs",
        ),
        Command(
            "plan train",
            "say whether a training run fits, how long its steps take, and what to change",
            "longctx.cli.plan_train_config:PlanTrainConfig",
            "longctx.cli.plan_train:plan_train",
        ),
        Command(
            "plan serve",
            "say whether every process of a deployment fits, what contexts it holds, and how fast it can be",
            "cluster.config:PlanServeConfig",
            "cluster.plan_serve:plan_serve",
        ),
        Command(
            "plan cluster",
            "simulate how a fleet of machines would serve a trace, with the router's own policies",
            "cluster.fleet.config:PlanClusterConfig",
            "cluster.plan_cluster:plan_cluster",
        ),
        Command(
            "plan attention",
            "show what each exchange plan of a sequence parallel attention moves, and how long it takes",
            "longctx.cli.plan_config:PlanAttentionConfig",
            "longctx.cli.plan:plan_attention",
        ),
        Command(
            "plan links",
            "measure how fast ranks of a Ray cluster reach each other, for the plans",
            "cluster.config:PlanLinksConfig",
            "cluster.plan_links:plan_links",
        ),
    )
}
