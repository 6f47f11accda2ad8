"""Asks the target like garak does, and writes its report. Crashes and leaves verdicts out on demand."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import urllib.request
from pathlib import Path

from garak import _plugins

PROMPTS = 4
ON_DEMAND = os.environ.get(
    "STAND_IN", ""
)  # "slow": wait before each prompt; "nones": the last one has no verdict


def ask(config: dict, prompt: str) -> str:
    target = config["plugins"]["generators"]
    if "rest" in target:
        rest = target["rest"]["RestGenerator"]
        body = json.dumps(rest["req_template_json_object"]).replace("$INPUT", prompt)
        request = urllib.request.Request(rest["uri"], body.encode(), rest["headers"], method="PUT")
        with urllib.request.urlopen(request) as answer:
            sentence = json.load(answer)["sentences"][0]
        between = re.escape(rest["skip_seq_start"]) + ".*?" + re.escape(rest["skip_seq_end"])
        return re.sub(between, "", sentence, flags=re.DOTALL)
    own = target["openai"]["OpenAICompatible"]
    body = {"model": config["plugins"]["target_name"], "messages": [{"role": "user", "content": prompt}]}
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ['OPENAICOMPATIBLE_API_KEY']}",
    }
    data = json.dumps({**body, "max_tokens": own["max_tokens"]}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{own['uri']}chat/completions", data, headers)
    ) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def attempt(probe: str, detector: str, prompt: str, output: str, status: int) -> dict:
    score = None if ON_DEMAND == "nones" and prompt.endswith("3") else float("sorry" not in output)
    return {
        "entry_type": "attempt",
        "status": status,
        "probe_classname": probe,
        "prompt": {"turns": [{"role": "user", "content": {"text": prompt}}]},
        "outputs": [{"text": output}],
        "detector_results": {detector: [score]} if status == 2 else {},
    }


def run(probe: str, config: dict, report) -> None:
    detector = _plugins.PROBES[f"probes.{probe}"][0]
    attempts = []
    for number in range(PROMPTS):
        if ON_DEMAND == "slow":
            time.sleep(0.5)
        prompt = f"{probe} asks {number}"
        output = ask(config, prompt)
        print(json.dumps(attempt(probe, detector, prompt, output, 1)), file=report, flush=True)
        attempts.append(attempt(probe, detector, prompt, output, 2))
        if probe == "dan.Crashing":
            raise RuntimeError("the probe is broken")
    for each in attempts:
        print(json.dumps(each), file=report)
    scores = [each["detector_results"][detector][0] for each in attempts]
    evaluation = {
        "entry_type": "eval",
        "probe": probe,
        "detector": detector,
        "passed": scores.count(0.0),
        "fails": scores.count(1.0),
        "nones": scores.count(None),
        "total_evaluated": len(scores) - scores.count(None),
    }
    print(json.dumps(evaluation), file=report)
    print(json.dumps({"entry_type": "probe_summary", "probe": probe}), file=report, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--spec")
    parser.add_argument("--narrow_output", action="store_true")
    given = parser.parse_args()
    config = json.loads(Path(given.config).read_text())
    where = config["reporting"]
    with (Path(where["report_dir"]) / f"{where['report_prefix']}.report.jsonl").open("w") as report:
        for name in given.spec.split(","):
            run(name.removeprefix("probes."), config, report)
        print(json.dumps({"entry_type": "completion"}), file=report)


if __name__ == "__main__":
    main()
