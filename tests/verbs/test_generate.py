"""`generate`: what is written is what the trained model writes, as it comes, once and in a chat."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lightning
from lora_lightning import CausalLM, Seq2SeqLM
from lora_lightning.errors import CheckpointError, ConfigError, LoraError, RecordError
from lora_lightning.runs.run import find_run
from lora_lightning.verbs.generate.chat import TerminalChat
from lora_lightning.verbs.generate.opening import open_module
from lora_lightning.verbs.generate.speaker import Speaker
from lora_lightning.verbs.generate.streaming import Stop, TextStream
from tests.helpers.command import run_command
from tests.helpers.lightning_modules import Net, trained
from tests.helpers.paths import child_environment
from tests.helpers.taught_lm import ANSWER, CHAT, QUESTION, base_with_other_eos, taught
from tests.helpers.tiny_lm import tiny_llama, tiny_tokenizer

OTHER = "Where do they play?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    return taught(folder, base_with_other_eos(folder / "base", "chatml"))


@pytest.fixture(scope="module")
def second(run: Path) -> Path:
    """Another adapter of the same base."""
    rows = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "five"}]}
    return taught(run.parent, run.parent / "base", rows, name="other-run")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    row = {"instruction": QUESTION, "output": ANSWER}
    return taught(folder, tiny_llama(folder / "base"), row, max_length=160)


@pytest.fixture(scope="module")
def t5_run(tmp_path_factory: Any) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = T5Config(vocab_size=len(tokenizer), **sizes, **ids, dropout_rate=0.0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    row = {"prompt": QUESTION, "completion": ANSWER}
    return taught(folder, folder / "base", row, steps=60, task=Seq2SeqLM)


def speaker_of(run: Path, **options: Any) -> Speaker:
    module, _ = open_module(run, None)
    module.eval()
    own: Any = {"default": ["default"]}
    return Speaker(module, own, **{"chat": None, "system": None, "max_new_tokens": 24, "options": {}, **options})  # fmt: skip


def rendered(tokenizer: Any, *messages: tuple[str, str]) -> list[int]:
    chat = [{"role": role, "content": text} for role, text in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [QUESTION, OTHER])
def test_it_is_the_text_of_the_merged_model_in_plain_transformers(run: Path, prompt: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module: Any = lora_lightning.load_from_checkpoint(CausalLM, find_run(run).checkpoint)
    merged = lora_lightning.merge_and_unload(module.eval()).network
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "base")
    plain = AutoModelForCausalLM.from_pretrained(run.parent / "base").eval()
    plain.load_state_dict(merged.state_dict())
    ids = torch.tensor([rendered(tokenizer, ("user", prompt))])
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    out = plain.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=ends)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    pieces: list[str] = []
    speaker = speaker_of(run)
    asked = speaker.ids(speaker.sample(prompt))
    assert asked == ids[0].tolist()
    assert speaker.say(asked, "default", pieces.append) == expected
    assert "".join(pieces) == expected
    assert len(pieces) > 3
    assert lora_lightning.generate(run, prompt) == expected
    if prompt == QUESTION:
        assert expected == ANSWER


def test_what_a_call_returns(run: Path, second: Path, capsys: Any) -> None:
    generate = lora_lightning.generate
    assert generate(run, [QUESTION, QUESTION]) == [ANSWER, ANSWER]
    assert generate(run, [{"role": "user", "content": QUESTION}]) == ANSWER
    found = generate(run, QUESTION, compare=True, adapter=[str(second)])
    assert [*found] == ["base", "default", "other_run"]
    assert (found["default"], found["other_run"]) == (ANSWER, "five")
    assert found["base"] not in (ANSWER, "five")
    assert capsys.readouterr().out == ""
    assert generate(run, QUESTION, stream=True, max_new_tokens=2) == "Paris is"
    assert capsys.readouterr().out == "Paris is\n"


def test_the_base_is_the_untrained_model(run: Path) -> None:
    module = CausalLM(str(run.parent / "base"), max_new_tokens=24)
    module.configure_model()
    module.eval()
    module.end_tokens = module.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    ids = torch.tensor([rendered(module.tokenizer, ("user", QUESTION))])
    found = lora_lightning.generate(run, QUESTION, compare=True)
    assert [found["base"]] == module.generate(ids)


def test_a_run_of_instructions(plain_run: Path, tmp_path: Path, caplog: Any) -> None:
    """They are asked in Alpaca's layout, as they were trained."""
    assert lora_lightning.generate(plain_run, QUESTION) == ANSWER
    speaker = speaker_of(plain_run)
    read = speaker.tokenizer.decode(speaker.ids(speaker.sample(QUESTION)))
    assert read.endswith(f"### Instruction:\n{QUESTION}\n\n### Response:\n")
    assert speaker.about() == ["prompts are instructions, in Alpaca's layout: as in training"]
    with pytest.raises(ConfigError, match=r"a system message begins a chat.*\(system\)"):
        lora_lightning.generate(plain_run, QUESTION, system="Be brief.")
    with pytest.raises(ConfigError, match=r"has no chat template.*\(chat\)"):
        lora_lightning.generate(plain_run, QUESTION, chat=True)
    with pytest.raises(ConfigError, match=r"messages are a chat.*\(prompt\)"):
        lora_lightning.generate(plain_run, [{"role": "user", "content": QUESTION}])


def test_an_encoder_decoder(t5_run: Path) -> None:
    pieces: list[str] = []
    speaker = speaker_of(t5_run)
    assert speaker.say(speaker.ids(speaker.sample(QUESTION)), "default", pieces.append) == ANSWER
    assert "".join(pieces) == ANSWER
    beams = {"num_beams": 2}
    assert lora_lightning.generate(t5_run, QUESTION, generation=beams, stream=True) == ANSWER
    with pytest.raises(ConfigError, match=r"is an encoder-decoder.*\(chat\)"):
        lora_lightning.generate(t5_run, QUESTION, chat=True)


def test_an_adapter_folder(run: Path, tmp_path: Path) -> None:
    """It names its base; where turns end is what the chat template says."""
    module, _ = open_module(run, None)
    lora_lightning.save_adapter(module, tmp_path / "peft")
    assert lora_lightning.generate(tmp_path / "peft", QUESTION) == ANSWER
    both = lora_lightning.generate(run, QUESTION, adapter=[str(tmp_path / "peft")])
    assert both == {"default": ANSWER, "peft": ANSWER}
    config = tmp_path / "peft/adapter_config.json"
    options = json.loads(config.read_text())
    for key, value, message in (
        ("task_type", "SEQ_CLS", "adapter of the kind 'SEQ_CLS'"),
        ("base_model_name_or_path", None, "does not name its base"),
    ):
        config.write_text(json.dumps({**options, key: value}))
        with pytest.raises(LoraError, match=message):
            lora_lightning.generate(tmp_path / "peft", QUESTION)
    with pytest.raises(ConfigError, match=r"has no checkpoints. \(ckpt\)"):
        lora_lightning.generate(tmp_path / "peft", QUESTION, ckpt="last")


def test_the_template_of_the_run_is_used(tmp_path: Path) -> None:
    """One that the data were given, and not the tokenizer's own."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ mark }}{% endif %}"
    )
    base = base_with_other_eos(tmp_path / "base", "chatml")
    file = tmp_path / "template.jinja"
    file.write_text(template)
    options = {"chat_template": str(file), "chat_template_kwargs": {"mark": ""}}
    run = taught(tmp_path, base, steps=1, **options)
    file.unlink()  # the checkpoint has it
    speaker = speaker_of(run)
    text = speaker.tokenizer.decode(speaker.ids(speaker.sample(QUESTION)))
    assert text == f"[user]{QUESTION}<|im_end|>[assistant]"
    assert "the chat template that the run was given: as in training" in speaker.about()[0]


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["gpt2", "llama3", "sentencepiece", "sentencepiece-prefix"])
def test_pieces_make_up_the_text(manner: str) -> None:
    tokenizer = tiny_tokenizer(manner=manner)
    text = "Hello  world\n    indented\n\n\ttab 日本語 🙂🙂 and é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    stream = TextStream(tokenizer, {tokenizer.eos_token_id}, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for id_ in (*ids, tokenizer.eos_token_id):
        stream.put(torch.tensor([id_]))
        assert "\ufffd" not in "".join(pieces)
    stream.end()
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).strip() == text
    assert "".join(tokenizer.decode([id_]) for id_ in ids) != text  # token by token is not enough


def test_bytes_that_are_no_character_come_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"][:2]
    pieces: list[str] = []
    stream = TextStream(tokenizer, (), pieces.append)
    stream.put(torch.tensor([[1]]))
    for id_ in ids:
        stream.put(torch.tensor([id_]))
    assert pieces == []
    stream.end()
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_decoder_that_tidies_up() -> None:
    class Tidy:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join("do n't"[: len(ids) + 3]).replace(" n't", "n't")

    pieces: list[str] = []
    stream = TextStream(Tidy(), (), pieces.append)  # type: ignore[arg-type]
    for id_ in range(4):
        stream.put(torch.tensor([id_]))
    stream.end()
    assert "".join(pieces).endswith("\ndon't")


def test_escapes_never_reach_the_terminal(run: Path, capsys: Any, monkeypatch: Any) -> None:
    def decode(self: Any, ids: Any, **_: Any) -> str:
        return "\x1b]0;owned\x07\x9b2J\r\u202e"[: len(ids)]

    monkeypatch.setattr(TextStream, "_text", lambda self: decode(self, self._ids))
    lora_lightning.generate(run, QUESTION, stream=True, max_new_tokens=20)
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & {*out}
    assert out.startswith(r"\x1b]0;o")


def test_an_answer_that_is_stopped(run: Path) -> None:
    speaker, stop = speaker_of(run), Stop()
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        stop.asked = len(pieces) == 2

    ids = speaker.ids(speaker.sample(QUESTION))
    text = speaker.say(ids, "default", show, stop)
    assert ANSWER.startswith(text)
    assert len(text) < len(ANSWER)
    assert text == "".join(pieces)
    assert speaker.say(ids, "default") == ANSWER  # the next one is whole


# -- prompts out of files and pipes ----------------------------------------------------------------


def test_a_file(run: Path, tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out/answers.jsonl"
    messages = [{"role": "user", "content": QUESTION}]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(2)))
    rows = lora_lightning.generate(run, file=str(file), out=str(out))
    assert rows == [{"prompt": messages, "prediction": ANSWER}] * 2
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    with pytest.raises(ConfigError, match=r"is there already.*--force. \(out\)"):
        lora_lightning.generate(run, file=str(file), out=str(out))
    again = lora_lightning.generate(
        run, file=str(file), out=str(out), force=True, compare=True, system="Be brief."
    )
    assert [*again[0]] == ["prompt", "base", "default"]
    assert again[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert [json.loads(line) for line in out.read_text().splitlines()] == again
    capsys.readouterr()
    lora_lightning.generate(run, file=str(file), stream=True)
    assert capsys.readouterr().out.count(f"{ANSWER}\n") == 2
    file.write_text(json.dumps({"prompt": QUESTION}))  # a text is a turn, as training had turns
    [row] = lora_lightning.generate(run, file=str(file))
    assert row == {"prompt": messages, "prediction": ANSWER}


def test_lines_of_the_standard_input(run: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\r\n\n{QUESTION}"))
    assert lora_lightning.generate(run, stream=True) == [ANSWER, ANSWER]
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ConfigError, match=r"there is nothing to answer.*\(prompt\)"):
        lora_lightning.generate(run)


# -- the chat --------------------------------------------------------------------------------------


def chat(
    speaker: Speaker, monkeypatch: Any, capsys: Any, *lines: Any, compare: bool = False
) -> tuple[TerminalChat, str]:
    """A chat in which these lines are typed, errors being raised, and what is shown."""
    typed: Iterator[Any] = iter(lines)

    def read(_: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    capsys.readouterr()
    talk = TerminalChat(speaker, compare)
    talk.run()
    return talk, capsys.readouterr().out


def test_a_conversation_is_kept(run: Path, monkeypatch: Any, capsys: Any) -> None:
    speaker, read = speaker_of(run), []
    say = Speaker.say

    def watched(self: Any, ids: list[int], *args: Any) -> str:
        read.append(ids)
        return say(self, ids, *args)

    monkeypatch.setattr(Speaker, "say", watched)
    lines = [QUESTION, KeyboardInterrupt(), "", OTHER, "/reset", QUESTION, "/system Be brief.", OTHER, "/quit", QUESTION]  # fmt: skip
    _, out = chat(speaker, monkeypatch, capsys, *lines)
    tokenizer, user, said = speaker.tokenizer, ("user", QUESTION), ("assistant", ANSWER)
    assert read == [
        rendered(tokenizer, user),
        rendered(tokenizer, user, said, ("user", OTHER)),
        rendered(tokenizer, user),
        rendered(tokenizer, ("system", "Be brief."), ("user", OTHER)),
    ]
    assert out.startswith("/help lists the commands")
    assert out.count(f"{ANSWER}\n") >= 2
    assert "Ctrl-D or /quit ends the chat" in out


def test_adapters_are_switched(
    run: Path, second: Path, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    from lora_lightning.verbs.generate.opening import add_adapters

    speaker = speaker_of(run)
    speaker.voices = add_adapters(speaker.module, [second])
    base = lora_lightning.generate(run, QUESTION, compare=True)["base"]
    capsys.readouterr()
    shown = lora_lightning.errors.printable(base)
    lines = ["/adapter", "/adapter other_run", QUESTION, "/reset", "/base", QUESTION, "/reset", "/adapter default", "/compare", QUESTION, "/adapter othr_run", "/hlp", "/x", "/help"]  # fmt: skip
    talk, out = chat(speaker, monkeypatch, capsys, *lines)
    assert "default (answers), other_run, base\n" in out
    assert "default, other_run (answers), base\nfive\n" in out
    assert f"other_run, base (answers)\n{shown}\n" in out
    assert f"base: {shown}\ndefault: {ANSWER}\n" in out
    assert "no adapter 'othr_run'. Did you mean 'other_run'?" in out
    assert "no command '/hlp'. Did you mean '/help'?" in out
    assert "no command '/x'. /help lists them." in out
    assert "/compare " in out
    assert talk.messages[-1]["content"] == ANSWER  # the adapter's, not the base's


def test_the_oldest_turns_are_forgotten(run: Path, monkeypatch: Any, capsys: Any) -> None:
    speaker = speaker_of(run)
    speaker.network.config.max_position_embeddings = 60
    talk, out = chat(speaker, monkeypatch, capsys, *[QUESTION] * 4, f"{QUESTION} " * 9, QUESTION)
    assert "(2 oldest turns are forgotten: 60 positions)" in out
    assert "the prompt has" in out  # a line that is too long alone
    assert "(prompt)" in out
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_a_chat_that_the_template_refuses_goes_on(run: Path, monkeypatch: Any, capsys: Any) -> None:
    speaker = speaker_of(run)
    template = "{{ raise_exception('no shouting') if messages[-1].content == 'HA' }}"
    speaker.module.prompting["chat_template"] = template + speaker.tokenizer.chat_template
    talk, out = chat(speaker, monkeypatch, capsys, "HA", QUESTION, "a\ud800")
    assert "no shouting" in out
    assert f"{ANSWER}\n" in out
    assert "(\\ud800)" in out or "surrogate" in out
    assert [m["content"] for m in talk.messages] == [QUESTION, ANSWER]


def test_plain_prompts_are_answered_one_by_one(
    plain_run: Path, monkeypatch: Any, capsys: Any
) -> None:
    talk, out = chat(speaker_of(plain_run), monkeypatch, capsys, QUESTION, QUESTION, "/system x")
    assert "each line is answered by itself" in out
    assert out.count(ANSWER) == 2
    assert "no command '/system'" in out
    assert talk.messages == []


# -- the command -----------------------------------------------------------------------------------


def test_the_command(run: Path, second: Path, monkeypatch: Any, capfd: Any) -> None:
    def command(*arguments: str, fails: int = 0) -> str:
        return run_command(
            run.parent, monkeypatch, capfd, "generate", "run", *arguments, fails=fails
        )

    assert f"{ANSWER}\n" in command("--prompt", QUESTION)
    out = command("--compare", "--prompt", QUESTION, "--adapter", "other-run", "--max_new_tokens=3")
    assert "base: " in out
    assert "\ndefault: Paris is the\n" in out
    assert "\nother_run: five\n" in out
    for text in ("null", "[1, 2]", "- a", "{a: 1}"):  # a text, whatever YAML would make of it
        asked: list[Any] = []
        monkeypatch.setattr(Speaker, "sample", lambda self, p, asked=asked: 1 / asked.append(p))
        with pytest.raises(TypeError):
            command("--prompt", text)
        assert asked == [text]
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["rnu", "--prompt", "x"], 1, "There is no run 'rnu'"),
        (["run", "--prompt", "x", "--file", "y"], 1, "a prompt or a file of prompts, not both"),
        (["run", "--prompt", "x", "--out", "y"], 1, "out is for the rows of a file"),
        (["run", "--file", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["run", "--prompt", "x", "--max_new_tokens", "0"], 1, "max_new_tokens must be at least 1"),
        (["run", "--prompt", "x", "--device", "cuda:99"], 1, "device='cuda:99' cannot be had"),
        (["run", "--prompt", "x", "--device", "qpu"], 1, "device='qpu' cannot be had"),
        (["run", "--prompt", "x " * 600], 1, "the model has positions for 512"),
        (["run", "--prompt", "x", "--generation", "{tempratur: 1}"], 1, "Did you mean 'temperature'"),
        (["run", "--prompt", "x", "--generation", "{max_length: 1}"], 1, "'max_length' cannot be had"),
        (["run", "--prompt", "x", "--adapter", "nowhere"], 1, "There is no run 'nowhere'"),
        (["run", "--promt", "x"], 2, "Did you mean '--prompt'"),
    ],
)  # fmt: skip
def test_mistakes(
    run: Path, monkeypatch: Any, capfd: Any, arguments: list[str], code: int, message: str
) -> None:
    out = run_command(run.parent, monkeypatch, capfd, "generate", *arguments, fails=code)
    assert message in out
    assert "Traceback" not in out


def test_wrong_calls(run: Path) -> None:
    for prompt in ([], 7, {"role": "user"}):
        with pytest.raises(ConfigError, match=r"prompt must be a text, a list of texts"):
            lora_lightning.generate(run, prompt)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="role"):
        lora_lightning.generate(run, [{"content": "x"}])


def test_other_models_are_refused(tmp_path: Path) -> None:
    """A module of one's own, whatever it predicts."""
    trained(tmp_path / "own", Net(), enable_checkpointing=True)
    [checkpoint] = (tmp_path / "own").rglob("*.ckpt")
    with pytest.raises(ConfigError, match=r"no language model.*lora-lightning predict.*\(run\)"):
        lora_lightning.generate(checkpoint, "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        lora_lightning.generate(tmp_path / "empty", "x")


def test_no_tokenizer(tmp_path: Path) -> None:
    base = base_with_other_eos(tmp_path / "base", "chatml")
    run = taught(tmp_path, base, steps=1)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    with pytest.raises(LoraError, match=r"AutoTokenizer cannot load"):
        lora_lightning.generate(run, "x")


@pytest.mark.slow
def test_a_process_of_its_own(run: Path) -> None:
    def ended(*arguments: str, **options: Any) -> Any:
        command = [sys.executable, "-c", "from lora_lightning.cli.main import main; main()"]
        return subprocess.run(
            [*command, "generate", *arguments],
            cwd=run.parent,
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
            **options,
        )

    done = ended("run", "--prompt", QUESTION)
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n"), done.stderr
    assert "turns of a chat, written by the chat template: as in training" in done.stderr
    assert "generation stops at '<|im_end|>'" in done.stderr
    piped = ended("run", input=f"{QUESTION}\n{QUESTION}\n")
    assert (piped.returncode, piped.stdout) == (0, f"{ANSWER}\n{ANSWER}\n"), piped.stderr
    assert ended("nowhere", "--prompt", "x").returncode == 1
