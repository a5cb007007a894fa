"""The page's words in English and Chinese. A test holds that both have the same keys and slots."""

from __future__ import annotations

from typing import Any

LANGUAGES = {"en": "English", "zh": "中文"}

_EN = {
    "tagline": "What is seen and heard in a clip, answered on this machine",
    "clip": "Clip",
    "empty_title": "No clip yet",
    "empty_text": "Drop a video, a sound or a picture here, record one, or try the example. "
    "A picture and its sound can be given together.",
    "limits": "Up to {mb} MB and {minutes} min. It stays on the machine that runs this demo, and is "
    "removed when you leave.",
    "file": "Open file",
    "camera": "Camera",
    "microphone": "Microphone",
    "example": "Example",
    "camera_label": "Record with camera and microphone; the clip opens when you stop",
    "microphone_label": "Record with the microphone; the clip opens when you stop",
    "opening": "Reading the clip",
    "uploading": "Uploading",
    "too_big": "{name} is larger than {mb} MB; give a shorter or smaller clip",
    "no_player": "The browser can't play this format. Everything else works.",
    "with_sound": "with sound",
    "no_sound": "no sound",
    "ask": "Ask",
    "question": "Question",
    "question_hint": "Is there a dog in the video?",
    "task": "Task",
    "free_question": "A free question",
    "not_trained": "untrained",
    "go": "Ask",
    "go_all": "All tasks",
    "stop": "Stop",
    "untrained_too": "All tasks: also those the model wasn't trained on",
    "router_record": "Record the router",
    "options": "Options",
    "try_asking": "Try",
    "answers": "Answers",
    "no_answers_title": "Nothing asked yet",
    "no_answers_text": "Ask a question, choose a task, or let all tasks run. The first answer reads the "
    "clip; follow-up questions reuse what was read.",
    "thinking": "Reading the clip",
    "answering": "Answering",
    "queued": "Waiting; ahead of you: {n}",
    "all_running": "tasks: {n}; tokens so far: {tokens}",
    "need_clip": "Open a clip first: a file, a recording, or the example",
    "clip_gone": "This page's clip was deleted: the page lost its connection, or wasn't used for long. Open "
    "the clip again",
    "need_question": "Type a question, or choose a task that needs none",
    "still_opening": "The clip is still being read; ask once it is shown",
    "already": "An answer is on its way; stop it first",
    "nothing_found": "Nothing found",
    "unparsed": "Not in the task's form: {reason}",
    "raw": "What the model said",
    "said_nothing": "(nothing)",
    "first_token": "first token {s}",
    "prefix_new": "clip read: {n} tokens",
    "prefix_reused": "prefix reused: {n} tokens",
    "speed": "{n} tokens, {rate}/s",
    "waited": "waited {s}",
    "all_tasks": "All tasks",
    "all_summary": "tasks: {tasks} in {s}; prefixes computed: {new}, reused: {reused}",
    "not_run": "Not run ({n})",
    "why_question": "needs a question; type one and run all tasks again",
    "why_untrained": "the model wasn't trained on it; tick the option to run it all the same",
    "why_same": "asks the same as {name}",
    "why_other_media": "made for other media than this clip's",
    "timeline": "Time line",
    "timeline_hint": "Click anywhere, or focus an event and press Enter, to play from there.",
    "timeline_empty": "Open a clip to see its pictures and its sound side by side.",
    "no_events": "No events yet. Tasks that find events: {tasks}.",
    "seen": "Seen",
    "heard": "Heard",
    "both": "seen and heard",
    "events_of": "Events of",
    "position": "Position in the clip",
    "from_to": "from {a} to {b} seconds",
    "on_picture": "On the picture",
    "on_picture_hint": "Boxes, points and masks, in the frame's own pixels.",
    "machine": "Machine",
    "engine": "Engine",
    "bundle": "Bundle",
    "precision": "Precision",
    "precision_value": "{bits}-bit weights, block {block}; adapters {adapter} bits, towers {tower}, KV {kv}",
    "threads": "threads: {n}",
    "tokens_s": "Tokens/s",
    "memory": "Memory",
    "memory_value": "{now} MB (peak {peak} MB)",
    "ttft": "First token",
    "ttft_first": "first question",
    "ttft_next": "follow-up",
    "ttft_share": "{p} % of the first",
    "none_yet": "after the first answer",
    "none_asked": "after the first question",
    "export": "Export",
    "export_empty": "Answers can be saved here, as soon as there are any.",
    "export_video": "Make annotated video",
    "export_making": "Drawing the video: {p} %",
    "export_no_video": "Only clips with a video can be annotated",
    "export_file_video": "Annotated video",
    "router": "Router",
    "router_hint": "Which expert spoke, by layer, token and modality. Tick “Record the router” under "
    "Options, then ask.",
    "error": "That didn't work",
    "unexpected": "Something failed inside the demo ({kind}); the terminal that runs it says more",
    "busy": "Too many questions are waiting already; try again in a moment",
}

_ZH = {
    "tagline": "片段里看到什么、听到什么，在本机回答",
    "clip": "片段",
    "empty_title": "还没有片段",
    "empty_text": "把视频、声音或图片拖到这里，也可以录制，或者先试试示例。图片可以和它的声音一起打开。",
    "limits": "最大 {mb} MB、{minutes} 分钟。文件只留在运行本演示的机器上，离开页面后即删除。",
    "file": "打开文件",
    "camera": "摄像头",
    "microphone": "麦克风",
    "example": "示例",
    "camera_label": "用摄像头和麦克风录制；停止后自动打开",
    "microphone_label": "用麦克风录制；停止后自动打开",
    "opening": "正在读取片段",
    "uploading": "正在上传",
    "too_big": "{name} 超过 {mb} MB；请换一个更短或更小的片段",
    "no_player": "浏览器不能播放这种格式，其他功能不受影响。",
    "with_sound": "有声音",
    "no_sound": "无声音",
    "ask": "提问",
    "question": "问题",
    "question_hint": "Is there a dog in the video?",
    "task": "任务",
    "free_question": "自由提问",
    "not_trained": "未训练",
    "go": "提问",
    "go_all": "全部任务",
    "stop": "停止",
    "untrained_too": "全部任务：包括模型未训练过的任务",
    "router_record": "记录路由",
    "options": "选项",
    "try_asking": "试试",
    "answers": "回答",
    "no_answers_title": "还没有提问",
    "no_answers_text": "输入问题、选择任务，或运行全部任务。第一次回答要读取片段，之后的追问会复用已读内容。",
    "thinking": "正在读取片段",
    "answering": "正在回答",
    "queued": "排队中，前面还有 {n} 个",
    "all_running": "{n} 个任务，已生成 {tokens} 个词元",
    "need_clip": "请先打开一个片段：文件、录制或示例",
    "clip_gone": "此页面的片段已删除：页面断开了连接，或长时间未使用。请重新打开片段",
    "need_question": "请输入问题，或选择不需要问题的任务",
    "still_opening": "片段仍在读取，请在显示后再提问",
    "already": "正在回答，请先停止",
    "nothing_found": "没有发现",
    "unparsed": "不符合任务的格式：{reason}",
    "raw": "模型原文",
    "said_nothing": "（空）",
    "first_token": "首词元 {s}",
    "prefix_new": "读取片段：{n} 个词元",
    "prefix_reused": "复用前缀：{n} 个词元",
    "speed": "{n} 个词元，{rate}/秒",
    "waited": "等待 {s}",
    "all_tasks": "全部任务",
    "all_summary": "{tasks} 个任务，用时 {s}；计算前缀 {new} 次，复用 {reused} 次",
    "not_run": "未运行（{n}）",
    "why_question": "需要问题；请输入后再次运行全部任务",
    "why_untrained": "模型未训练过；勾选选项即可照样运行",
    "why_same": "与 {name} 的提问相同",
    "why_other_media": "适用于其他类型的媒体",
    "timeline": "时间线",
    "timeline_hint": "点击任意位置，或聚焦事件后按回车，即从该处播放。",
    "timeline_empty": "打开片段后，这里并排显示画面与声音。",
    "no_events": "还没有事件。能找出事件的任务：{tasks}。",
    "seen": "看到",
    "heard": "听到",
    "both": "看到并听到",
    "events_of": "事件来自",
    "position": "片段中的位置",
    "from_to": "{a} 到 {b} 秒",
    "on_picture": "画面标注",
    "on_picture_hint": "框、点和掩码，以原始像素标出。",
    "machine": "机器",
    "engine": "引擎",
    "bundle": "模型包",
    "precision": "精度",
    "precision_value": "权重 {bits} 位，块 {block}；适配器 {adapter} 位，编码器 {tower} 位，KV {kv}",
    "threads": "线程：{n}",
    "tokens_s": "词元/秒",
    "memory": "内存",
    "memory_value": "{now} MB（峰值 {peak} MB）",
    "ttft": "首词元",
    "ttft_first": "首次提问",
    "ttft_next": "追问",
    "ttft_share": "首次的 {p} %",
    "none_yet": "第一次回答后显示",
    "none_asked": "第一次提问后显示",
    "export": "导出",
    "export_empty": "有了回答之后，可以在这里保存。",
    "export_video": "生成标注视频",
    "export_making": "正在绘制视频：{p} %",
    "export_no_video": "只有带视频的片段才能标注",
    "export_file_video": "标注视频",
    "router": "路由",
    "router_hint": "哪个专家在发言：按层、词元和模态。请在选项中勾选“记录路由”后提问。",
    "error": "没有成功",
    "unexpected": "演示内部出错（{kind}）；详情见运行它的终端",
    "busy": "等待的提问太多，请稍后再试",
}

TEXTS = {"en": _EN, "zh": _ZH}

_ABOUT = {
    "en": {
        "ave": "events seen and heard",
        "avvp": "events seen, events heard",
        "unav": "events in long videos",
        "arig": "what sounds, and where in the picture",
        "s4": "mask of what sounds",
        "ms3": "masks of all that sounds",
        "ref_avs": "mask of what is meant",
        "avqa": "questions about a clip",
        "avqa_thu": "questions with options",
        "avcap": "a caption",
        "ks": "the action",
        "ucf": "the action",
        "meld": "the speaker's emotion",
        "mer24": "the speaker's emotion",
        "cremad": "the speaker's emotion",
        "mafw": "the person's emotion",
        "dfew": "the person's emotion",
        "a2v": "which video fits the sound",
        "v2a": "which sound fits the video",
    },
    "zh": {
        "ave": "看到并听到的事件",
        "avvp": "看到的事件与听到的事件",
        "unav": "长视频中的事件",
        "arig": "什么在发声，在画面何处",
        "s4": "发声物体的掩码",
        "ms3": "所有发声物体的掩码",
        "ref_avs": "所指物体的掩码",
        "avqa": "关于片段的问题",
        "avqa_thu": "带选项的问题",
        "avcap": "描述",
        "ks": "动作",
        "ucf": "动作",
        "meld": "说话人的情绪",
        "mer24": "说话人的情绪",
        "cremad": "说话人的情绪",
        "mafw": "人物的情绪",
        "dfew": "人物的情绪",
        "a2v": "哪个视频符合声音",
        "v2a": "哪个声音符合视频",
    },
}

_PLAYER = ("uploading", "too_big")


def say(language: str, key: str, **slots: Any) -> str:
    """A text, its slots filled."""
    text = TEXTS.get(language, _EN)[key]
    return text.format(**slots) if slots else text


def about(language: str, task: str, family: str) -> str:
    """What a task is for, in a few words; its family for one that isn't known here."""
    return _ABOUT.get(language, _ABOUT["en"]).get(task, family)


def for_browser(language: str) -> dict[str, str]:
    """The texts that the page's own script shows."""
    return {key: TEXTS.get(language, _EN)[key] for key in _PLAYER}


def preferred(accept_language: str) -> str:
    """The page's language for a browser's Accept-Language header."""
    best, weight = "en", 0.0
    for entry in accept_language[:400].split(","):
        name, _, rest = entry.strip().partition(";")
        code = name.strip().lower().partition("-")[0]
        try:
            q = float(rest.partition("q=")[2]) if "q=" in rest else 1.0
        except ValueError:
            q = 0.0
        if code in LANGUAGES and q > weight:
            best, weight = code, q
    return best
