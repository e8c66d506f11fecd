"""Accuracy of a checkpoint on a data set, by source. The sampler of the stages answers the rows,
greedily or with several samples a row, and the verifier of stage 3 judges the answers (D21).

output_dir/generations.jsonl gets every response with its judgement. output_dir/eval.json gets the
flags on which numbers depend, and these values, all but the last two also `by_source`:

    accuracy              share of responses with a right answer
    pass_at_k             with k samples a row: share of rows with any right answer
    caption_accuracy      share of right captions, where rows list accepted captions
    format_valid          share of responses in the paper's format
    mean_response_tokens  tokens of a response
    truncated             share of responses that were cut off at --max_completion_length
    rows                  rows that were answered
    rows_left_out         rows that could not be used
    responses_unread      responses that --untagged would take too long to read

    torchrun --nproc_per_node=8 eval.py --ckpt rl_out --data mathvista.jsonl
    python eval.py --ckpt out/demo/sft --data digits                the test digits
"""

import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import regex
import torch.distributed as dist
from tqdm import tqdm

from data import BLOCKS, TAGS, Encoded, Response, decode, load_examples, parse_response
from model import load_policy
from sampler import Sampling, generate
from support.ending import main
from support.errors import RowError, UserError, counted
from support.fields import Count, Natural, NonNegative
from support.flags import parse
from support.loader import batches
from support.ranks import barrier, join_ranks, rank, world_size, say
from support.resuming import replacing, write_json
from support.rows import check_truth
from support.run import start_verifier
from support.verifier import verify


@dataclass
class EvalConfig:
    stage: ClassVar[str] = "eval"
    ckpt: str = "prism-vlm/Qwen3-VL-4B-Instruct-SFT-PRISM"  # the policy: a directory or hub id
    data: list[str] = field(default_factory=list)  # rows with an `answer`, or: digits
    output_dir: str | None = None  # where results go; none: --ckpt, or out/eval for a hub id
    system_prompt: str | None = None  # for rows without one: text or file; none: see docs/data.md
    image_dir: str | None = None  # a folder for images, besides the data file's own folder
    max_pixels: Count | None = None  # pixels in the largest image; none: see docs/data.md
    untagged: str | None = None  # regex with groups caption, think, answer; matches all of a text
    per_device_eval_batch_size: Count = 64  # rows a rank answers at a time
    max_completion_length: Count = 8192  # longest response in tokens
    num_samples: Count = 1  # responses sampled per row
    temperature: NonNegative = 0.0  # sampling temperature; 0: greedy
    max_rollout_rows: Count | None = 32  # responses that a rank samples at a time
    dry_run: Natural = 0  # print the memory that this run needs per GPU on N GPUs, then stop


MATCH_LIMIT = 1.0  # seconds of processor time that --untagged may take for a response
MAX_PARTS = 1_000_000  # characters of --untagged times its counts; as many take up to 0.4 GB


def check_pattern(untagged: str) -> None:
    """UserError where --untagged is no regular expression with a group for each block."""
    # The compiler writes a repeated part out as often as the part has to occur, nested ones as
    # often as the product of their counts.
    times = math.prod(int(count) or 1 for count in re.findall(r"\{(\d{1,9})", untagged))
    if times * len(untagged) > MAX_PARTS:
        raise UserError(
            f"--untagged {untagged}: its counts multiply to {times}, which takes too much memory; "
            f"write * or +, or lower numbers"
        )
    try:
        groups = regex.compile(untagged).groupindex
    except (regex.error, RecursionError, MemoryError) as error:
        why = str(error) or "memory ran out"
        raise UserError(
            f"--untagged {untagged}: is no regular expression ({why}); write one with the groups "
            f"{', '.join(BLOCKS)}"
        ) from None
    if {*groups} != {*BLOCKS}:
        raise UserError(
            f"--untagged {untagged}: has the groups {', '.join(groups) or 'none'}; name them "
            f"{', '.join(BLOCKS)}, as in (?P<answer>.*)"
        )


def read_response(text: str, untagged: str | None) -> Response | None:
    """A response by its tags. A model that was never taught the format writes no tags. Its text is
    read by the groups of the pattern `untagged`, which must match all of the text. A group that
    takes no part is empty. TimeoutError where the match takes longer than MATCH_LIMIT, or where a
    recursive pattern leaves no memory."""
    response = parse_response(text)
    if response is None and untagged and not any(tag in text for tag in TAGS):
        try:
            match = regex.fullmatch(untagged, text, regex.DOTALL, timeout=MATCH_LIMIT)
        except MemoryError:
            raise TimeoutError from None
        if match:
            response = Response(**match.groupdict(""))
    return response


def same_caption(caption: str, accepted: list[str]) -> bool:
    """Whether a caption says what an accepted one says. Case, punctuation and white space do not
    count."""

    def words(text):
        return re.findall(r"\w+", text.casefold())

    return words(caption) in [words(text) for text in accepted]


def summarise(responses: list[dict]) -> dict:
    """Means over responses; a row of the data has one or several. A mean is None where no response
    has a value."""

    def mean(name):
        values = [response[name] for response in responses if response[name] is not None]
        return sum(values) / len(values) if values else None

    correct_of = {response["row"]: [] for response in responses}  # by row: is each response right
    for response in responses:
        correct_of[response["row"]].append(response["correct"])
    summary = {"accuracy": mean("correct")}
    if len(responses) > len(correct_of):
        summary["pass_at_k"] = sum(map(any, correct_of.values())) / len(correct_of)
    return summary | {
        "caption_accuracy": mean("caption_correct"),
        "format_valid": mean("format_valid"),
        "mean_response_tokens": mean("tokens"),
        "truncated": mean("truncated"),
        "rows": len(correct_of),
    }


# The flags on which no number depends.
FREE = ("output_dir", "per_device_eval_batch_size", "max_rollout_rows", "dry_run")


def settings_of(config: EvalConfig) -> dict:
    """The flags on which the numbers depend, as eval.json has them."""
    fields = asdict(config).items()
    return {name: located(value) for name, value in fields if name not in FREE}


def keep_other_results(config: EvalConfig, output_dir: str) -> None:
    """UserError where the directory holds the result of another evaluation, which this one would
    overwrite."""
    try:
        with open(os.path.join(output_dir, "eval.json")) as file:
            before = dict(json.load(file))
    except (OSError, ValueError, TypeError):  # there is none
        return
    # A result in the checkpoint's own directory is that checkpoint's, wherever it was moved to.
    moved = os.path.realpath(output_dir) == os.path.realpath(config.ckpt)
    for name, mine in settings_of(config).items():
        theirs = located(before.get(name, mine))
        if theirs != mine and not (name == "ckpt" and moved):
            raise UserError(
                f"{output_dir}/eval.json: holds a result of --{name} {as_typed(theirs)}, not "
                f"of {as_typed(mine)}; name another --output_dir, or remove the file"
            )


def located(value):
    """A flag's value with the whole paths of files and directories: in another folder, a file of
    the same name is another file."""
    if isinstance(value, list):
        return [located(one) for one in value]
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def as_typed(value) -> str:
    """A flag's value as on the command line; of a long one the beginning."""
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value))[:300]


def evaluate() -> None:
    start = time.perf_counter()
    config = parse(EvalConfig)
    device = join_ranks()
    if not config.data:
        raise UserError("--data is missing; name a file of rows, or `digits`")
    if config.num_samples > 1 and not config.temperature:
        raise UserError(f"--num_samples {config.num_samples}: needs a --temperature above 0")
    if config.untagged is not None:
        check_pattern(config.untagged)
    if config.output_dir and os.path.isfile(config.output_dir):
        raise UserError(f"--output_dir {config.output_dir} is a file; name a directory")
    default_dir = config.ckpt if os.path.isdir(config.ckpt) else "out/eval"
    output_dir = config.output_dir or default_dir
    start_verifier()
    # Every row needs an `answer`, the ground truth.
    examples = load_examples(config, ("answer",), config.ckpt)
    keep_other_results(config, output_dir)
    policy, processor = load_policy(config.ckpt, device)

    def encode(example, prompt):
        """A row as (row, prompt x)."""
        check_truth(example.answer)
        return example, prompt

    batch_size = config.per_device_eval_batch_size * world_size()
    encoded = Encoded(examples, processor, encode, max_pixels=config.max_pixels)
    this_rank = rank(), world_size()
    stream = batches(encoded, batch_size, seed=0, total=len(examples), share=this_rank)
    sampling = Sampling(
        num_generations=config.num_samples,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        max_rollout_rows=config.max_rollout_rows,
    )
    responses, left_out, unread = [], [], []  # unread: where the pattern would take too long

    def judge(example, branch) -> dict:
        """One response with its judgement, as generations.jsonl has it."""
        text = decode(processor, branch, policy.stop_ids)
        try:
            response = read_response(text, config.untagged)
        except (TimeoutError, MemoryError):  # a pattern may backtrack, or recur, for ever
            response = None
            unread.append(example.where)
        right = response is not None and verify(response.answer, example.answer)
        right_caption = response is not None and same_caption(response.caption, example.captions)
        return {
            "row": example.index,
            "where": example.where,
            "source": example.source,
            "answer": example.answer,
            "response": text,
            "format_valid": parse_response(text) is not None,
            "read": response is not None,
            "correct": right,
            "caption_correct": right_caption if example.captions else None,
            "tokens": len(branch),
            "truncated": int(branch[-1]) not in policy.stop_ids.tolist(),
        }

    steps = range(math.ceil(len(examples) / batch_size))
    for _ in tqdm(steps, desc="eval", disable=rank() != 0):
        # Draw this rank's rows of a batch.
        items = next(stream)
        left_out += [f"{where}: {item}" for where, item in items if isinstance(item, RowError)]
        pairs = [item for _, item in items if not isinstance(item, RowError)]
        barrier()  # notices a rank that is gone; in `generate` NCCL would end this one unsaid
        # Sample the responses, and judge each.
        groups = generate(policy, [prompt for _, prompt in pairs], sampling)
        for (example, _), group in zip(pairs, groups):
            responses += [judge(example, branch) for branch in group.branches]

    # Gather what all ranks have.
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, (responses, left_out, unread))
        responses = [response for part, _, _ in parts for response in part]
        left_out = [line for _, part, _ in parts for line in part]
        unread = [where for _, _, part in parts for where in part]

    # Tell the user what was left out.
    for line in left_out[:3]:
        say(f"left out: {line}")
    if len(left_out) > 3:
        say(
            f"left out: {len(left_out)} of {len(examples)} rows in all; the result is of the others"
        )
    if unread:
        say(
            f"--untagged {config.untagged}: {counted(len(unread), 'response')} would take over "
            f"{MATCH_LIMIT:g} s each to match, and so count as wrong; the first is of row "
            f"{unread[0]}; give a pattern that backtracks less"
        )
    if not responses:
        raise UserError(
            f"--data: of {counted(len(examples), 'row')} none can be used; {left_out[0]}"
        )

    # Write both files, and tell the user the result.
    if rank() == 0:
        responses.sort(key=lambda response: response["row"])
        by_source = {response["source"]: [] for response in responses}
        for response in responses:
            by_source[response["source"]].append(response)
        result = {
            **settings_of(config),
            **summarise(responses),
            "rows_left_out": len(left_out),
            "responses_unread": len(unread),
            "by_source": {source: summarise(part) for source, part in sorted(by_source.items())},
            "seconds": time.perf_counter() - start,
        }
        os.makedirs(output_dir, exist_ok=True)
        with replacing(os.path.join(output_dir, "generations.jsonl")) as file:
            file.writelines(json.dumps(response) + "\n" for response in responses)
        write_json(os.path.join(output_dir, "eval.json"), result)
        names = ("accuracy", "pass_at_k", "caption_accuracy", "format_valid")
        shown = [f"{name} {result[name]:.3f}" for name in names if result.get(name) is not None]
        where = f"written to {output_dir}/eval.json"
        say(f"{config.ckpt}: {', '.join(shown)} on {counted(result['rows'], 'row')}; {where}")
        if not any(response["read"] for response in responses):
            first = " ".join(responses[0]["response"].split())[:100]
            if config.untagged is None:
                why = "no response has the format <caption>, <think>, <answer>"
                remedy = "give a policy that SFT has taught it, or a pattern by --untagged"
            else:
                why = f"--untagged {config.untagged}: it matches no response from end to end"
                remedy = "mend the pattern"
            say(f"{why}, so all count as wrong; {remedy}. The first response: {first}")


if __name__ == "__main__":
    main(evaluate)
