// Gradio's client hears of its events over one stream, which the server ends when none is left. An event queued at
// that moment can be lost: the answer to its request overtakes the news of the end, the client believes that the
// stream is still open, then closes it, and the page stays as it is. So the news is kept from the client as long as
// an event is under way; the stream is opened again behind its back.
(() => {
  "use strict";
  const plain = window.fetch.bind(window);
  const done = new Set(); // completed before the answer to their request was here
  const open = new Set();
  let joining = 0;

  async function join(input, init) {
    joining += 1;
    try {
      const response = await plain(input, init);
      const id = (await response.clone().json().catch(() => ({}))).event_id;
      if (id && !done.delete(id)) open.add(id);
      return response;
    } finally {
      joining -= 1;
    }
  }

  function heard(text) {
    let message = {};
    try { message = JSON.parse(text.replace(/^data:\s*/, "")); } catch { /* not ours to judge */ }
    if (message.msg === "process_completed" && !open.delete(message.event_id)) done.add(message.event_id);
    if (message.msg === "unexpected_error") open.clear();
    return message.msg;
  }

  async function pass(again, first, out) {
    let response = first;
    for (;;) {
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      let ended = false;
      for (;;) {
        const { done: over, value } = await reader.read();
        if (over) break;
        const texts = (rest + value).split("\n\n");
        rest = texts.pop();
        for (const text of texts) {
          ended = heard(text) === "close_stream" && (joining > 0 || open.size > 0);
          if (!ended) out.enqueue(new TextEncoder().encode(`${text}\n\n`));
        }
      }
      if (!ended) return out.close();
      response = await again();
      if (!response.ok || !response.body) throw new Error(`the stream of events answered ${response.status}`);
    }
  }

  async function stream(input, init) {
    const request = new Request(input, init);
    const again = () => plain(request.clone());
    const response = await again();
    if (!response.ok || !response.body) return response;
    const body = new ReadableStream({
      start(out) {
        pass(again, response, out).catch((error) => {
          if (error.name !== "AbortError") open.clear(); // broken: the client gives all its events up
          out.error(error);
        });
      },
    });
    return new Response(body, { status: response.status, headers: response.headers });
  }

  window.fetch = (input, init) => {
    const path = new URL(input instanceof Request ? input.url : input, location.href).pathname;
    if (path.endsWith("/queue/join")) return join(input, init);
    if (path.endsWith("/queue/data")) return stream(input, init);
    return plain(input, init);
  };
})();
