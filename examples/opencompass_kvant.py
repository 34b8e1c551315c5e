"""OpenCompass evaluates models that ``kvant serve`` serves; see docs/opencompass.md.

    kvant serve MODEL --kv int8 --model-name kvant
    opencompass examples/opencompass_kvant.py -w outputs/kvant

The data sets are those of LMDeploy's tables of its quantized KV cache, in the same configurations.
Environment variables say what differs from one machine to the next:

    KVANT_SERVERS      LABEL=ADDRESS of each server, with commas; each is a column of the summary
    KVANT_MODEL        name of the model in requests (--model-name of kvant serve)
    KVANT_TOKENIZER    folder or hub name of its tokenizer, with which OpenCompass counts tokens
    KVANT_CONTEXT      tokens of prompt and answer together that the model takes
    KVANT_CONCURRENCY  requests at a time
    KVANT_API_KEY      key that the server asks for, if it does
    KVANT_LIMIT        take so many items of each data set and subject (default: all)
"""

import os

from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.ceval.ceval_gen_5f30c7 import ceval_datasets
    from opencompass.configs.datasets.gsm8k.gsm8k_gen_1d7fe4 import gsm8k_datasets
    from opencompass.configs.datasets.mmlu.mmlu_gen_a484b3 import mmlu_datasets
    from opencompass.configs.datasets.race.race_gen_69ee4f import race_datasets
    from opencompass.configs.datasets.triviaqa.triviaqa_gen_2121ce import triviaqa_datasets
    from opencompass.configs.summarizers.medium import summarizer as medium

from opencompass.models import OpenAISDK
from opencompass.partitioners import NaivePartitioner
from opencompass.runners import LocalRunner
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask

servers = os.environ.get("KVANT_SERVERS", "kvant=http://127.0.0.1:23333/v1")
columns = [server.strip().partition("=") for server in servers.split(",")]
if not all(x and "/" not in x and address.startswith("http") for x, _, address in columns):
    raise SystemExit(f"KVANT_SERVERS is {servers!r}; give LABEL=http://HOST:PORT/v1, with commas")
model = os.environ.get("KVANT_MODEL", "kvant")
concurrency = int(os.environ.get("KVANT_CONCURRENCY", "16"))
limit = os.environ.get("KVANT_LIMIT", "")  # nothing: "[:]", all of them

datasets = [
    *ceval_datasets,
    *mmlu_datasets,
    *triviaqa_datasets,
    *gsm8k_datasets,
    *race_datasets,
]
summarizer = {  # of the table "medium": what is measured here
    "dataset_abbrs": ["ceval", "mmlu", "triviaqa", "gsm8k", "race-middle", "race-high"],
    "summary_groups": medium["summary_groups"],
}
for dataset in datasets:
    dataset["reader_cfg"]["test_range"] = f"[:{limit}]"

models = [
    {
        "type": OpenAISDK,
        "abbr": label,
        "path": model,
        "openai_api_base": address,
        "key": os.environ.get("KVANT_API_KEY", "none"),
        "tokenizer_path": os.environ.get("KVANT_TOKENIZER", model),
        "meta_template": {
            "round": [
                {"role": "HUMAN", "api_role": "HUMAN"},
                {"role": "BOT", "api_role": "BOT", "generate": True},
            ]
        },
        "temperature": 0,  # greedy: formats are compared, not draws
        "max_out_len": 100,  # of data sets that do not say: their answers are letters
        "max_seq_len": int(os.environ.get("KVANT_CONTEXT", "8192")),
        "mode": "mid",  # a message too long loses its middle; "none" would fail the whole task
        "batch_size": 8 * concurrency,  # OpenCompass waits for a batch before it begins the next
        "max_workers": concurrency,
        "query_per_second": 100,  # more than there will be: the server has a queue of its own
        "retry": 3,
        "timeout": 3600,
    }
    for label, _, address in columns
]

# "n" data sets or subjects are one process, which takes some seconds to start.
infer = {
    "partitioner": {"type": NaivePartitioner, "n": 20},
    "runner": {"type": LocalRunner, "max_num_workers": 1, "task": {"type": OpenICLInferTask}},
}
eval = {
    "partitioner": {"type": NaivePartitioner, "n": 20},
    "runner": {"type": LocalRunner, "max_num_workers": 2, "task": {"type": OpenICLEvalTask}},
}

del os, columns, dataset, medium  # OpenCompass stores what is left as the configuration of the run
