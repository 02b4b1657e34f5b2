"""The chat judge: reading verdicts, an endpoint with faults, and a real small model in vLLM."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.alignment.judges.build import build_judge
from sparring.alignment.judges.cache import VerdictCache
from sparring.alignment.judges.chat_models import Answer, Token
from sparring.alignment.judges.llm import TEMPLATE, LLMJudge, read_verdict, verdict_logit
from sparring.alignment.judges.protocol import checked_matrix
from sparring.launch.errors import SparringError, UsageError

QUESTION = "{prompt}\n1: {first}\n2: {second}"


def longer(first, second):
    """What the fake model thinks: the longer answer is better."""
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "T"


class Endpoint:
    """A server that speaks chat completions; `faults` are taken before the model's own answer."""

    def __init__(self):
        self.faults = []
        self.requests = []
        self.logprobs = True
        self.usage = True
        self.say = longer
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.headers, body))
                fault = endpoint.faults.pop(0) if endpoint.faults else None
                if isinstance(fault, float):
                    time.sleep(fault)
                if isinstance(fault, int):
                    self.reply(fault, {"error": {"message": f"fault {fault}", "type": "test"}})
                else:
                    self.reply(200, endpoint.answer(body, fault))

            def reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):  # a client that timed out has gone
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, body, text):
        lines = body["messages"][0]["content"].split("\n")
        if text is None:
            text = self.say(lines[-2].removeprefix("1: "), lines[-1].removeprefix("2: "))
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        choice["message"] = {"role": "assistant", "content": text}
        if self.logprobs and body.get("logprobs"):
            other = {"A": "B", "B": "A"}.get(text, "A")
            top = [{"token": text, "logprob": -0.25}, {"token": f" {other}", "logprob": -1.5}]
            content = {**top[0], "bytes": None, "top_logprobs": [{**t, "bytes": None} for t in top]}
            choice["logprobs"] = {"content": [content], "refusal": None}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply["choices"] = [choice]
        if self.usage:
            reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
        return reply


@pytest.fixture
def endpoint():
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


def judge_of(endpoint, **options):
    quick = {"base_url": endpoint.url, "backoff": 0.01, "timeout": 5.0, "template": QUESTION}
    return build_judge("llm", "small", **quick | options)


# -------------------------------------------------------------------------------- reading verdicts


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        (" **B**.", "B"),
        ("b", "B"),
        ("T", "T"),
        ("Tie", "T"),
        ("A\n\nIt is more helpful.", "A"),
        ("Both try.\nThe better answer is:\n(B)", "B"),
        ("Answer A is better than answer B.", "A"),
        ("Verdict: [[C]]", "T"),
        ("I compared A and B. [[B]]", "B"),
        ("The better response is B", "B"),
        ("They are equally good.", "T"),
        ("A better answer would cite sources.", None),
        ("Answer A says this, and answer B says that.", None),
        ("[[A]] or [[B]]", None),
        ("", None),
        ("Sure! Here is a poem.", None),
        ("ABBA", None),
    ],
)
def test_verdicts_are_read_or_not_guessed(text, verdict):
    assert read_verdict(text) == verdict


def answer(text, *tops):
    return Answer(text, tuple(Token(next(iter(top)), top) for top in tops))


def test_logits_come_from_the_verdicts_token():
    both = {"A": -0.2, " A": -3.0, "B": -1.9, "The": -5.0}
    expected = math.log(math.exp(-0.2) + math.exp(-3.0)) + 1.9
    assert verdict_logit(answer("A", both), 2, 10) == pytest.approx(expected)
    late = answer("Answer B is better", {"Answer": -0.1, "A": -3.0}, {" B": -0.5, " A": -1.0})
    assert verdict_logit(late, 2, 10) == pytest.approx(-0.5)
    # The verdict is where it is named, not where the response is.
    words = ["A", " is", " short", ".", " Verdict", ": [[", "A", "]]"]
    tops = [{"A": -0.01, "B": -9.0}, *[{w: -0.1} for w in words[1:6]], {"A": -0.5, "B": -0.9}, {}]
    made = Answer("".join(words), tuple(map(Token, words, tops)))
    assert verdict_logit(made, 2, 10) == pytest.approx(0.4)
    words, tops = [*words[6:7], "\n", *words[:3]], [tops[6], {}, *tops[:3]]
    made = Answer("A\nA is short", tuple(map(Token, words, tops)))
    assert verdict_logit(made, 2, 10) == pytest.approx(0.4)
    # B is not listed, so it has at most what "x" has.
    assert verdict_logit(answer("A", {"A": -0.1, "x": -4.1}), 2, 10) == pytest.approx(4.0)
    assert verdict_logit(answer("A", {"A": -0.1, "B": -9999.0}), 2, 10) == 10
    # No verdict in words, but both letters were likely first tokens.
    unspoken = answer("The first", {"The": -0.1, "A": -3.0, "B": -4.0})
    assert verdict_logit(unspoken, 2, 10) == pytest.approx(1.0)
    assert verdict_logit(answer("The first", {"The": -0.1, "A": -3.0}), 2, 10) is None


def test_without_log_probabilities_the_words_count():
    assert [verdict_logit(Answer(t), 2.5, 10) for t in ("A", "B", "T", "?")] == [2.5, -2.5, 0, None]


@given(st.text(max_size=40), st.floats(-50, 0), st.floats(-50, 0))
def test_any_answer_gives_a_finite_logit_or_none(text, first, second):
    for made in (Answer(text), answer(text, {"A": first, "B": second})):
        logit = verdict_logit(made, 2.0, 10.0)
        assert logit is None or abs(logit) <= 10


def test_texts_cannot_pose_as_places():
    judge = LLMJudge.__new__(LLMJudge)
    judge.template = TEMPLATE
    odd = ("{second} </s>", "{prompt} [SEP] <|source|>", "{first} None \\1")
    question = judge.question(odd)
    assert all(question.count(text) == 1 for text in odd)


# --------------------------------------------------------------------------------------- endpoint


def test_both_orders_are_asked_and_tokens_are_counted(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = judge_of(endpoint, api_key_env="JUDGE_KEY", price_in=10.0, price_out=1000.0)
    responses = ["a long answer", "short", "None </s> [SEP] <|source|>"]
    matrix = checked_matrix(judge, ["why?"], [responses])
    np.testing.assert_allclose(matrix[0, 0], [0, 1.25, -1.25])
    np.testing.assert_allclose(matrix, -matrix.swapaxes(1, 2))
    headers, body = endpoint.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)
    usage = judge.usage()
    assert usage["requests"] == usage["pairs_computed"] == 6
    assert usage["input_tokens"] == 600
    assert usage["price"] == pytest.approx((600 * 10 + 12 * 1000) / 1e6)
    assert usage["unparsed"] == usage["without_logprobs"] == 0
    assert "secret" not in judge.identity
    np.testing.assert_array_equal(judge.details(["why?"], [responses])["unparsed"], [[0, 0, 0]])


def test_an_endpoint_without_log_probabilities_and_usage(endpoint):
    endpoint.logprobs = endpoint.usage = False
    judge = judge_of(endpoint, verdict_logit=3.0)
    matrix = judge.matrix(["why?"], [["long", "so", "it"]])
    np.testing.assert_array_equal(matrix[0], [[0, 3, 3], [-3, 0, 0], [-3, 0, 0]])
    assert judge.usage()["without_logprobs"] == 6
    assert judge.usage()["input_tokens"] == 0
    np.testing.assert_array_equal(judge_of(endpoint).matrix(["why?"], [["one"]]), [[[0]]])


def test_equal_texts_tie_without_being_asked_about(endpoint):
    np.testing.assert_array_equal(
        judge_of(endpoint).matrix(["q"], [["x", "x"]]), np.zeros((1, 2, 2))
    )
    assert endpoint.requests == []


def test_faults_are_tried_again(endpoint):
    endpoint.faults = [500, 503, 429, "hm", "let me think"]
    judge = judge_of(endpoint, concurrency=1, retries=5)
    assert judge.logits(["q"], ["long"], ["so"])[0] == pytest.approx(1.25)
    assert judge.usage()["requests"] == 6
    assert judge.usage()["unparsed"] == 0


def test_garbage_above_the_cap_ends_the_stage_with_examples(endpoint, tmp_path):
    endpoint.say = lambda first, second: longer(first, second) if "good" in first else "lorem ipsum"
    judge = judge_of(endpoint, retries=1)
    judge.open_cache(str(tmp_path))
    with pytest.raises(SparringError, match=r"no verdict on \d of 2 .*max_failures.*lorem ipsum"):
        judge.matrix(["q"], [["good", "so"]])
    # What was paid for is kept, what has no verdict is not.
    assert len(VerdictCache(tmp_path, judge.identity)) <= 1


def test_garbage_below_the_cap_is_a_counted_tie(endpoint, tmp_path):
    endpoint.say = lambda first, second: "?" if first == "odd" else longer(first, second)
    judge = judge_of(endpoint, retries=0, max_failures=0.5)
    judge.open_cache(str(tmp_path))
    responses = [["odd", "longer", "x"]]
    matrix = checked_matrix(judge, ["q"], responses)
    assert matrix[0, 0, 1] == matrix[0, 0, 2] == 0
    assert matrix[0, 1, 0] == pytest.approx(1.25)
    assert judge.usage()["unparsed"] == 2
    np.testing.assert_allclose(judge.details(["q"], responses)["unparsed"], [[0.5, 0.25, 0.25]])
    assert len(VerdictCache(tmp_path, judge.identity)) == 4
    endpoint.say = longer  # asked again, not remembered as a tie
    again = judge_of(endpoint, retries=0)
    again.open_cache(str(tmp_path))
    assert np.count_nonzero(again.matrix(["q"], responses)) == 6
    assert again.usage()["pairs_computed"] == 2


def test_nobody_there_is_an_error_with_the_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    judge = build_judge("llm", "small", base_url=url, retries=1, backoff=0.01)
    with pytest.raises(SparringError, match=rf"{url} cannot be reached .*is the server running"):
        judge.matrix(["q"], [["a", "b"]])


def test_silence_is_an_error_and_one_late_answer_is_not(endpoint):
    endpoint.faults = [3.0] * 4
    judge = judge_of(endpoint, timeout=0.2, retries=0, concurrency=1)
    with pytest.raises(SparringError, match=r"has not answered once \(no answer within 0.2 s"):
        judge.matrix(["q"], [["a", "bb"]])
    endpoint.faults = []
    judge = judge_of(endpoint, timeout=1.0, retries=0, concurrency=1, max_failures=0.5)
    judge.logits(["q"], ["a"], ["bb"])
    endpoint.faults = [3.0]
    assert judge.logits(["q"], ["ccc"], ["bb"])[0] == 0
    assert judge.usage()["unparsed"] == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_is_not_tried_again(endpoint, status):
    endpoint.faults = [status] * 9
    with pytest.raises(SparringError, match=rf"refuses the model 'small': HTTP {status}"):
        judge_of(endpoint, concurrency=1).matrix(["q"], [["a", "bb"]])
    assert len(endpoint.requests) <= 2  # the next question may be on its way already


def test_a_question_that_is_too_long_has_no_verdict(endpoint):
    endpoint.faults = [400]
    judge = judge_of(endpoint, concurrency=1, max_failures=0.5)
    matrix = judge.matrix(["q"], [["word " * 3000, "b"]])
    assert np.count_nonzero(matrix) == 1
    assert judge.usage()["requests"] == 2


def test_identity_follows_what_decides_scores(endpoint):
    judge = judge_of(endpoint)
    same = judge_of(endpoint, concurrency=2, timeout=9.0, price_in=1.0, retries=0)
    assert same.identity == judge.identity
    others = [
        judge_of(endpoint, **change)
        for change in (
            {"template": QUESTION + "!"},
            {"verdict_logit": 1.0},
            {"logprobs": False},
            {"max_tokens": 3},
        )
    ]
    assert len({judge.identity, *(other.identity for other in others)}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{prompt} {first}"}, r"template has no \{second\}"),
        ({"verdict_logit": 0.0}, "verdict_logit"),
        ({"clip": 1.0}, "clip"),
        ({"max_failures": 2.0}, "max_failures"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env names 'NO_SUCH_KEY'"),
        ({"temperature": 1.0}, "has no option 'temperature'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build_judge("llm", "small", base_url="http://127.0.0.1:1/v1", **options)
    with pytest.raises(UsageError, match=r"needs judge\.path"):
        build_judge("llm")


class Local:
    """A chat model in this process that answers in its own order."""

    identity = "local/1"
    max_tokens = 1

    def __init__(self):
        self.counts = Counter(input_tokens=0, output_tokens=0)

    def ask(self, questions, readable):
        for n in reversed(range(len(questions))):
            lines = questions[n].split("\n")
            given = Answer(longer(lines[-2][3:], lines[-1][3:]))
            assert readable(given)
            yield n, given


@given(st.permutations(range(4)))
def test_permuting_responses_permutes_the_matrix(order):
    texts = ["a", "bb", "ccc", "dd"]
    matrix = LLMJudge(Local(), QUESTION).matrix(["q"], [texts])[0]
    permuted = LLMJudge(Local(), QUESTION).matrix(["q"], [[texts[i] for i in order]])[0]
    np.testing.assert_array_equal(permuted, matrix[np.ix_(order, order)])


REAL = """
import json, sys
from sparring.alignment.judges.build import build_judge
judge = build_judge("llm", "smollm2", dtype="float32", max_length=1024, max_failures=1.0)
prompts, responses = json.loads(sys.argv[1])
matrix = judge.matrix(prompts, responses).tolist()
usage = judge.usage()
again = judge.matrix(prompts, responses).tolist()
unparsed = judge.details(prompts, responses)["unparsed"].tolist()
print(json.dumps([matrix, usage, again, unparsed, judge.identity]))
"""


@pytest.mark.slow
def test_a_real_small_model_in_vllm():
    """SmolLM2 answers, the letters' log-probabilities are read, and asking again agrees.

    In a process of its own, as a stage runs: vLLM's imports warn, and its engine keeps its memory.
    """
    prompts = ["What is the capital of France?"]
    responses = [["The capital of France is Paris.", "banana banana banana", "word " * 3000]]
    done = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps([prompts, responses])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    matrix, usage, again, unparsed, identity = json.loads(done.stdout.splitlines()[-1])
    matrix = np.array(matrix)
    assert usage["unparsed"] == 4  # 3,000 tokens do not fit into 1024
    assert unparsed == [[0.5, 0.5, 1.0]]
    np.testing.assert_array_equal(matrix[0, 2], 0)
    np.testing.assert_array_equal(matrix[0, :, 2], 0)
    assert np.all(np.abs(matrix[0, [0, 1], [1, 0]]) > 0)
    assert usage["requests"] == 2
    assert usage["input_tokens"] > 100
    assert identity.startswith("llm/1 vllm ")
    np.testing.assert_allclose(again, matrix, atol=1e-3)
