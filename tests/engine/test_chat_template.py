import json
from datetime import datetime

import pytest
from tiny_models import BUNDLED
from transformers import PreTrainedTokenizerFast

from vashista.engine.chat_template import ChatTemplate, require_chat_template
from vashista.engine.errors import ChatTemplateError, ChatTemplateFileError, TokenizerError

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string[3:] + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {% generation %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
        {% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
"""

CHATS = {
    "one question": [{"role": "user", "content": "Hi <b>&</b> 'you' 日本 "}],
    "with a system message": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Hi"}],
    "several turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "Two?"},
    ],
}


def folder_with(tmp_path, template, **config):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    (tmp_path / "tokenizer.json").write_bytes((BUNDLED / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | {"chat_template": template} | config))
    return tmp_path


def load(tmp_path, template, **config):
    template = ChatTemplate.load(folder_with(tmp_path, template, **config))
    assert template is not None
    return template


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL], ids=["llama 3", "chatml", "mistral"])
def test_prompts_equal_those_of_transformers(template, chat, add_generation_prompt, tmp_path):
    ours = load(tmp_path, template)
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True, bos_token="<s>", eos_token="</s>")
    variables = {"date_string": "26 Jul 2024", "enable_thinking": False}
    expected = judge.apply_chat_template(
        CHATS[chat], tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
    assert ours.render(CHATS[chat], add_generation_prompt, **variables) == expected


def test_tools_are_written_without_html_escapes_as_in_transformers(tmp_path):
    tools = [{"type": "function", "function": {"name": "a<b", "description": "日本 & 'x'", "parameters": {}}}]
    ours = load(tmp_path, LLAMA3)
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True, bos_token="<s>", eos_token="</s>")
    expected = judge.apply_chat_template(CHATS["one question"], tools=tools, tokenize=False, date_string="1 Jan 2026")
    assert ours.render(CHATS["one question"], False, tools=tools, date_string="1 Jan 2026") == expected


def test_a_template_of_a_model_folder_writes_a_transcript():
    template = require_chat_template(ChatTemplate.load(BUNDLED))
    messages = [
        {"role": "system", "content": "The code of elephant is 48213."},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "what is the code of elephant? "},
    ]
    assert template.render(messages) == (
        "The code of elephant is 48213.\n\nQuestion: hello there\nAnswer: Good day.\n\n"
        "Question: what is the code of elephant?\nAnswer:"
    )
    with pytest.raises(ChatTemplateError, match="not wizard"):
        template.render([{"role": "wizard", "content": "x"}])


def test_the_date_comes_from_the_clock_that_is_passed_in(tmp_path):
    folder = folder_with(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
    template = ChatTemplate.load(folder, now=lambda: datetime(2031, 2, 3))
    assert template is not None
    assert template.render([]) == "2031-02-03"


def test_a_template_file_goes_before_the_tokenizers_config(tmp_path):
    folder = folder_with(tmp_path, "old")
    (folder / "chat_template.jinja").write_text("new {{ bos_token }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = ChatTemplate.load(folder)
    assert template is not None
    assert template.render([]) == "new <s>"
    assert template.render([], tools=[{"type": "function"}]) == "tools"


def test_named_templates_are_chosen_by_the_presence_of_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = load(tmp_path, named)
    assert (template.render([]), template.render([], tools=[{}])) == ("plain", "tools")
    with pytest.raises(ChatTemplateError, match="none named default"):
        load(tmp_path, named[1:]).render([])


@pytest.mark.parametrize("prefill", ["The answer is (", "end", "<|im_", "Hi", "", "One two "])
@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL], ids=["llama 3", "chatml", "mistral"])
def test_an_unfinished_message_is_the_end_of_its_prompt(template, prefill, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": prefill}]
    ours = load(tmp_path, template)
    text = ours.render_unfinished(messages, date_string="26 Jul 2024")
    assert text.endswith(prefill)
    finished = ours.render([messages[0], {"role": "assistant", "content": "@"}], False, date_string="26 Jul 2024")
    assert text.removesuffix(prefill) == finished.partition("@")[0]


@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL], ids=["llama 3", "chatml", "mistral"])
def test_prompts_of_unfinished_messages_equal_those_of_transformers(template, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is ("}]
    ours = load(tmp_path, template)
    judge = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True, bos_token="<s>", eos_token="</s>")
    expected = judge.apply_chat_template(
        messages, tokenize=False, continue_final_message=True, date_string="26 Jul 2024"
    )
    assert ours.render_unfinished(messages, date_string="26 Jul 2024") == expected


@pytest.mark.parametrize("source", ["fixed", "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"])
def test_a_template_that_hides_the_end_of_a_message_cannot_continue_it(source, tmp_path):
    with pytest.raises(ChatTemplateError, match="cannot continue"):
        load(tmp_path, source).render_unfinished([{"role": "assistant", "content": "x"}])


def test_only_the_assistants_message_is_continued(tmp_path):
    with pytest.raises(ChatTemplateError, match="'user'"):
        load(tmp_path, CHATML).render_unfinished(CHATS["one question"])


def test_a_template_that_refuses_the_messages_gives_its_own_words(tmp_path):
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        load(tmp_path, MISTRAL).render([{"role": "assistant", "content": "I go first"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_an_error_inside_a_template_is_named(source, tmp_path):
    with pytest.raises(ChatTemplateError, match="chat template"):
        load(tmp_path, source).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source, tmp_path):
    with pytest.raises(ChatTemplateError):
        load(tmp_path, source).render([{"role": "user", "content": "x"}])


def test_variables_of_a_request_cannot_collide_with_arguments(tmp_path):
    template = load(tmp_path, "{{ self_ }}{{ messages | length }}")
    assert template.render([{}], **{"self": 1, "self_": "x", "messages": 7}) == "x1"


def test_a_template_that_is_no_jinja_is_refused_with_its_line(tmp_path):
    for wrong in ("{% if %}", "{{ messages[0]['content'] | nofilter }}"):
        with pytest.raises(ChatTemplateFileError, match="error in line 2"):
            load(tmp_path, f"fine\n{wrong}")


def test_a_folder_without_a_template_says_what_to_do(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    with pytest.raises(ChatTemplateError, match=r"/v1/completions.*chat_template\.jinja"):
        require_chat_template(None)


@pytest.mark.parametrize("value", [7, [1], [{"name": "default"}], [{"name": 1, "template": 2}]])
def test_a_malformed_entry_in_the_config_is_refused(value, tmp_path):
    with pytest.raises(TokenizerError, match="chat_template"):
        load(tmp_path, value)


ROUND = "range(100000)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (f"{{% for a in {ROUND} %}}{{% for b in {ROUND} %}}{{% endfor %}}{{% endfor %}}", "not done after"),
        (f"{{% for a in {ROUND} %}}{{% for b in {ROUND} if b < 0 %}}{{% endfor %}}{{% endfor %}}", "not done after"),
        (
            f"{{% macro f() %}}{{% for a in {ROUND} %}}x{{% endfor %}}{{% endmacro %}}"
            f"{{% for a in {ROUND} %}}{{% set x = f() %}}{{% endfor %}}",
            "not done after",
        ),
        (f"{{% set s = 'x' * 1000000 %}}{{% for a in {ROUND} %}}{{{{ s }}}}{{% endfor %}}", "longer than"),
        ("{{ 'x' * 10**9 }}", "multiplication"),
        ("{{ [1] * 10**9 }}", "multiplication"),
        ("{{ 10**(10**10) }}", "bits"),
        ("{{ '%1000000000d' % 1 }}", "width"),
    ],
)
def test_a_template_without_end_or_measure_is_stopped(source, words, tmp_path):
    template = load(tmp_path, source)
    with pytest.raises(ChatTemplateError, match=f"was stopped: .*{words}"):
        template.render([{"role": "user", "content": "x"}])


def test_a_long_conversation_is_rendered_within_the_bounds(tmp_path):
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "x"}] * 1000
    assert load(tmp_path, CHATML).render(messages).count("<|im_end|>") == 2001
    assert load(tmp_path, "{{ 7 % 3 }} {{ 2 ** 10 }} {{ '-' * 3 }} {{ '%03d' % 5 }}").render([]) == "1 1024 --- 005"
