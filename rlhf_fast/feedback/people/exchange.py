"""To and from Argilla and Label Studio.

Looked up in their sources and documentation: Argilla 2's ``dataset.records.to_json`` (and the list of responses of version 1),
Label Studio's JSON export with its Ranker and Pairwise tags. Neither can say that two responses are equally good, so a text
field ``ranks`` stands beside the ranking, ``1 2 2`` for the responses in their order, and is believed first.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_fast.data.sources import Records
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.candidates import Candidates, shuffled
from rlhf_fast.feedback.people.items import Items, annotator_name, item_id
from rlhf_fast.feedback.people.store import MARGINS, Label, Store
from rlhf_fast.rewards.judging import conversation_text
from rlhf_fast.rewards.verifiers import text_of

FORMATS = ("argilla", "label-studio")
RESPONSE = re.compile(r"(response|completion|generation|reply|answer|output|text)s?[ _-]*(\d+|[a-d])", re.IGNORECASE)
PROMPT = ("prompt", "instruction", "question", "input", "context")

# what our tasks look like in Label Studio: Settings > Labeling Interface > Code
LABEL_STUDIO_CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <List name="responses" value="$items" title="Best first"/>
  <Ranker name="rank" toName="responses"/>
  <TextArea name="ranks" toName="prompt" placeholder="ties: 1 2 2, a rank for each response"/>
  <Choices name="margin" toName="prompt"><Choice value="slightly"/><Choice value="clearly"/><Choice value="much"/></Choices>
  <Choices name="quality" toName="prompt"><Choice value="all bad"/></Choices>
  <TextArea name="reason" toName="prompt" placeholder="why"/>
</View>
"""


def recognise(records: Records) -> str | None:
    """``argilla``, ``label-studio``, or None for our own columns."""
    columns = set(records[0])
    if "fields" in columns and isinstance(records[0]["fields"], Mapping):
        return "argilla"
    return "label-studio" if "data" in columns and isinstance(records[0]["data"], Mapping) else None


def read(records: Records, form: str) -> tuple[list[Candidates], list[Label], int]:
    """The items of an export of theirs, the labels in it, and how many records have nothing to compare.

    Raises:
        UserError: a record without a prompt or without responses.
    """
    read_one = {"argilla": _argilla, "label-studio": _label_studio}[form]
    candidates, labels, alone = [], [], 0
    for i, record in enumerate(records):
        try:
            prompt, responses, answers = read_one(record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{records.where(i)}: no {form} record of prompt and responses ({error})") from None
        found = shuffled(Candidates(prompt, list(responses.values())))
        if found is None:
            alone += 1
            continue
        candidates.append(found)
        names = [[name for name, text in responses.items() if text == mine] for mine in found.responses]
        labels += [label for answer in answers if (label := _label(answer, found, names))]
    if not candidates:
        raise UserError(f"{records.source}: no record has two different responses, so there is nothing to compare")
    return candidates, labels, alone


def _label(answer: Mapping[str, Any], item: Candidates, names: Sequence[Sequence[str]]) -> Label | None:
    """A label from ``{annotator, ranks: {name of a response: rank}, margin, bad, reason}``; None where a rank is missing."""
    ranks = [min((answer["ranks"][n] for n in mine if n in answer["ranks"]), default=None) for mine in names]
    if None in ranks:
        return None
    levels = sorted(set(ranks))
    place = tuple(levels.index(rank) + 1 for rank in ranks)
    margin = MARGINS.index(answer["margin"]) + 1 if answer.get("margin") in MARGINS else None
    rest = {"bad": bool(answer.get("bad")), "reason": str(answer.get("reason") or ""), "done": True}
    return Label(item_id(item), annotator_name(answer["annotator"]), ranks=place, margin=margin, **rest)


# ----------------------------------------------------------------------------------------------------------- Argilla


def _argilla(record: Mapping[str, Any]) -> tuple[Any, dict[str, str], Iterator[dict[str, Any]]]:
    fields = {name: value for name, value in record["fields"].items() if value is not None}
    responses = {name: str(value) for name, value in fields.items() if RESPONSE.fullmatch(name)}
    prompt = next((fields[name] for name in PROMPT if name in fields), None)
    if prompt is None or not responses:
        raise ValueError(f"its fields are {', '.join(fields) or 'none'}")
    return prompt, responses, _argilla_answers(record.get("responses") or {}, list(responses))


def _argilla_answers(given: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    people: dict[str, dict[str, Any]] = {}
    if isinstance(given, Mapping):  # version 2: question -> answers of all
        for question, answers in given.items():
            for answer in answers:
                people.setdefault(str(answer["user_id"]), {})[question] = answer["value"]
    else:  # version 1: everybody's answers
        for answer in given:
            if answer.get("status", "submitted") == "submitted":
                values = {question: value["value"] for question, value in answer["values"].items()}
                people[str(answer.get("user_id"))] = values
    for who, values in people.items():
        ranks = _text_ranks(values.get("ranks"), names) or _ranks_of_question(values, names)
        if ranks:
            yield {
                "annotator": values.get("annotator") or who,
                "ranks": ranks,
                **{k: values.get(k) for k in ("margin", "bad", "reason")},
            }


def _ranks_of_question(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, int] | None:
    """From the first ranking question, or label question, whose answers name the responses."""
    plain = {re.sub(r"[\W_]+", "", name).lower(): name for name in names}
    for value in values.values():
        if isinstance(value, list) and value:
            entries = [v if isinstance(v, Mapping) else {"value": v} for v in value]
            found = [plain.get(re.sub(r"[\W_]+", "", str(e.get("value"))).lower()) for e in entries]
            if None not in found:
                return {name: e.get("rank") or i for i, (name, e) in enumerate(zip(found, entries), 1)}
        elif isinstance(value, str) and len(names) == 2:
            said = re.sub(r"[\W_]+", "", value).lower()
            if said in plain:
                return {name: 1 + (name != plain[said]) for name in names}
            if said in ("tie", "equal", "same"):
                return dict.fromkeys(names, 1)
    return None


def _text_ranks(value: Any, names: Sequence[str]) -> dict[str, int] | None:
    ranks = re.findall(r"\d+", value) if isinstance(value, str) else []
    return dict(zip(names, map(int, ranks))) if len(ranks) == len(names) else None


def to_argilla(items: Items, store: Store) -> list[dict[str, Any]]:
    """Records for ``dataset.records.from_json``: a field per response, a ranking question, and text questions beside it.

    Their users are UUIDs: everybody gets the one that the name gives (uuid5).
    """
    rows = []
    for identity, item, labels in _labelled(items, store):
        names = [f"response_{i + 1}" for i in range(len(item.responses))]
        answers: dict[str, list[dict[str, Any]]] = {}
        for label in labels:
            user = str(uuid.uuid5(uuid.NAMESPACE_URL, f"rlhf-fast:{label.annotator}"))
            values = {"ranking": _best_first(label, names), "ranks": _spaced(label), "annotator": label.annotator}
            values |= _extras(label)
            for question, value in values.items():
                answers.setdefault(question, []).append({"value": value, "user_id": user})
        texts = dict(zip(names, map(text_of, item.responses)))
        fields = {"prompt": conversation_text(item.prompt), **texts}
        rest = {"metadata": {}, "suggestions": {}, "responses": answers, "vectors": {}}
        rows.append({"id": identity, "fields": fields, **rest})
    return rows


# ------------------------------------------------------------------------------------------------------ Label Studio


def _label_studio(task: Mapping[str, Any]) -> tuple[Any, dict[str, str], Iterator[dict[str, Any]]]:
    data = task["data"]
    prompt = next((data[name] for name in PROMPT if data.get(name)), None)
    if isinstance(data.get("items"), list):
        responses = {str(e["id"]): str(e.get("body") or e.get("title") or e.get("html") or "") for e in data["items"]}
    else:
        responses = {name: str(value) for name, value in data.items() if RESPONSE.fullmatch(name)}
    if prompt is None or not responses:
        raise ValueError(f"its data has {', '.join(data) or 'nothing'}")
    return prompt, responses, _label_studio_answers(task.get("annotations") or [], list(responses))


def _label_studio_answers(annotations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            continue
        who = annotation.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, Mapping) else who
        answer: dict[str, Any] = {"annotator": str(who), "ranks": {}}
        for region in annotation.get("result") or []:
            _read_region(region, names, answer)
        if answer["ranks"]:
            yield answer


def _read_region(region: Mapping[str, Any], names: Sequence[str], answer: dict[str, Any]) -> None:
    value, name = region.get("value") or {}, region.get("from_name")
    if region.get("type") == "pairwise" and value.get("selected") in ("left", "right"):
        answer["ranks"] = dict(zip(names, (1, 2) if value["selected"] == "left" else (2, 1)))
    elif region.get("type") == "ranker":
        ranked = value.get("ranker")
        order = next(iter(ranked.values()), []) if isinstance(ranked, Mapping) else ranked
        answer["ranks"] = answer["ranks"] or {str(identity): i for i, identity in enumerate(order or [], 1)}
    elif region.get("type") == "textarea" and name == "ranks":
        answer["ranks"] = _text_ranks(" ".join(value["text"]), names) or answer["ranks"]
    elif region.get("type") == "textarea" and name == "reason":
        answer["reason"] = "\n".join(value["text"])
    elif region.get("type") == "choices" and name in ("margin", "quality"):
        chosen = value["choices"][0] if value.get("choices") else None
        answer["margin" if name == "margin" else "bad"] = chosen


def to_label_studio(items: Items, store: Store) -> list[dict[str, Any]]:
    """Tasks for Label Studio's JSON import, for the labelling interface of ``LABEL_STUDIO_CONFIG``."""
    rows = []
    for identity, item, labels in _labelled(items, store):
        names = [str(i) for i in range(len(item.responses))]
        entries = [
            {"id": n, "title": f"Response {int(n) + 1}", "body": text_of(r)} for n, r in zip(names, item.responses)
        ]
        data = {"prompt": conversation_text(item.prompt), "items": entries, "item_id": identity}
        annotations = [{"completed_by": {"email": x.annotator}, "result": _regions(x, names)} for x in labels]
        rows.append({"data": data, "annotations": annotations})
    return rows


def _regions(label: Label, names: Sequence[str]) -> list[dict[str, Any]]:
    ranking = {"from_name": "rank", "to_name": "responses", "type": "ranker"}
    regions = [{**ranking, "value": {"ranker": {"rank": _best_first(label, names)}}}]
    for name, text in {"ranks": _spaced(label), **_extras(label)}.items():
        if name in ("margin", "bad"):
            value = {"choices": [text]}
            regions.append({"from_name": "quality" if name == "bad" else name, "type": "choices", "value": value})
        else:
            regions.append({"from_name": name, "type": "textarea", "value": {"text": [text]}})
    return [{"to_name": "prompt", **region} for region in regions]


# ------------------------------------------------------------------------------------------------------------- both


def _labelled(items: Items, store: Store) -> Iterator[tuple[str, Candidates, list[Label]]]:
    by_item: dict[str, list[Label]] = {}
    for label in store:
        if label.done and label.ranks is not None:
            by_item.setdefault(label.item, []).append(label)
    for place in range(len(items)):
        identity, item = items[place]
        yield identity, item, by_item.get(identity, [])


def _best_first(label: Label, names: Sequence[str]) -> list[str]:
    assert label.ranks is not None
    return [names[i] for i in sorted(range(len(names)), key=label.ranks.__getitem__)]


def _spaced(label: Label) -> str:
    return " ".join(map(str, label.ranks or ()))


def _extras(label: Label) -> dict[str, str]:
    extras = {"margin": MARGINS[label.margin - 1] if label.margin else "", "bad": "all bad" if label.bad else ""}
    return {k: v for k, v in {**extras, "reason": label.reason}.items() if v}
