// The page's own script: seeking, the play head, suggestions, dropped files, the size limit.
// Gradio replaces the page's parts at any time, so everything listens on the document.
(() => {
  "use strict";
  const maxBytes = MAX_BYTES;
  const find = (selector) => document.querySelector(selector);
  const player = () => find("#ce-player video") || find("#ce-player audio");
  const texts = () => (find(".ce-header") || { dataset: {} }).dataset;

  const clock = (seconds) => {
    const tenths = Math.round(seconds * 10) / 10;
    const minutes = Math.floor(tenths / 60);
    return `${minutes}:${(tenths - 60 * minutes).toFixed(1).padStart(4, "0")}`;
  };

  // Seeking ---------------------------------------------------------------------------------------------------

  let wanted = null; // where the play head is shown when nothing can play

  function seek(seconds) {
    const media = player();
    wanted = seconds;
    if (media) {
      const go = () => { media.currentTime = seconds; };
      if (media.readyState >= 1) go();
      else if (!media.error) { media.addEventListener("loadedmetadata", go, { once: true }); media.load(); }
    }
    paint();
  }

  function scrub(event, area) {
    const line = area.closest(".ce-timeline");
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    seek(share * Number(line.dataset.duration));
  }

  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (!target) return;
    const ask = target.closest("[data-ask]");
    if (ask) return fillQuestion(ask.dataset.ask);
    const stop = target.closest("[data-seek]");
    if (stop) return seek(Number(stop.dataset.seek));
    const area = target.closest("[data-scrub]");
    if (area) scrub(event, area);
  });

  let dragging = null;
  document.addEventListener("pointerdown", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (target && event.button === 0 && !target.closest("[data-seek]")) dragging = target.closest("[data-scrub]");
  });
  document.addEventListener("pointermove", (event) => { if (dragging && dragging.isConnected) scrub(event, dragging); });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { dragging = null; });

  document.addEventListener("keydown", (event) => {
    const axis = event.target instanceof Element ? event.target.closest(".ce-axis") : null;
    if (!axis) return;
    const duration = Number(axis.closest(".ce-timeline").dataset.duration);
    const now = position();
    const step = Math.max(0.5, duration / 60);
    const to = {
      ArrowRight: now + step, ArrowUp: now + step, ArrowLeft: now - step, ArrowDown: now - step,
      PageUp: now + 10 * step, PageDown: now - 10 * step, Home: 0, End: duration,
    }[event.key];
    if (to === undefined) {
      if ((event.key === "Enter" || event.key === " ") && player()) {
        event.preventDefault();
        if (player().paused) player().play(); else player().pause();
      }
      return;
    }
    event.preventDefault();
    seek(Math.min(duration, Math.max(0, to)));
  });

  // The play head ---------------------------------------------------------------------------------------------

  function position() {
    const media = player();
    return media && media.readyState >= 1 ? media.currentTime : wanted || 0;
  }

  let painted = "";
  function paint() {
    const line = find(".ce-timeline");
    if (!line) { painted = ""; return; }
    const duration = Number(line.dataset.duration);
    const now = Math.min(duration, position());
    const key = `${now.toFixed(2)}/${duration}`;
    const head = line.querySelector(".ce-playhead");
    if (key === painted && head.style.left) return;
    painted = key;
    head.style.left = `${(100 * now) / duration}%`;
    const axis = line.querySelector(".ce-axis");
    axis.setAttribute("aria-valuenow", now.toFixed(1));
    axis.setAttribute("aria-valuetext", clock(now));
    for (const event of line.querySelectorAll(".ce-event")) {
      const from = Number(event.dataset.seek);
      const to = Number(event.dataset.end);
      event.classList.toggle("ce-now", now >= from && now < to);
    }
  }
  // Frames are only asked for while something plays.
  let running = false;
  function follow() {
    paint();
    const media = player();
    running = Boolean(media && !media.paused && !media.ended);
    if (running) requestAnimationFrame(follow);
  }
  for (const name of ["play", "playing", "pause", "seeking", "seeked", "timeupdate", "loadedmetadata", "ended"]) {
    document.addEventListener(name, () => { if (!running) follow(); }, true);
  }

  // Media the browser can't play ------------------------------------------------------------------------------

  document.addEventListener("error", (event) => {
    const media = event.target;
    if (media instanceof HTMLMediaElement && media.closest("#ce-player")) {
      media.hidden = true;
      const note = find(".ce-unplayable");
      if (note) note.hidden = false;
    }
  }, true);

  // Questions -------------------------------------------------------------------------------------------------

  function fillQuestion(text) {
    const field = find("#ce-question textarea, #ce-question input");
    if (!field) return;
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
  }

  // While an answer runs nothing else is asked: its card is the page's only place for it.
  const busy = () => Boolean(find(".ce-live"));
  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (target && busy() && target.closest("#ce-go, #ce-go-all")) event.stopImmediatePropagation();
  }, true);
  document.addEventListener("keydown", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (target && busy() && event.key === "Enter" && target.closest("#ce-question")) event.stopImmediatePropagation();
  }, true);

  // Files -----------------------------------------------------------------------------------------------------

  const chooser = () => find("input[type=file][data-ce]") || document.querySelectorAll("#ce-left input[type=file]")[0];

  function message(html) {
    document.body.classList.toggle("ce-own", Boolean(html)); // hides what the server said last
    const place = find(".ce-said") || (() => {
      const made = document.createElement("div");
      made.className = "ce-said";
      const host = find("#ce-stage");
      host.parentElement.insertBefore(made, host.nextSibling);
      return made;
    })();
    place.replaceChildren();
    if (html) place.append(html);
  }

  function note(className, role, text) {
    const box = document.createElement("p");
    box.className = className;
    box.setAttribute("role", role);
    box.textContent = text;
    return box;
  }

  // Before Gradio sees the files: one that is too large isn't even sent.
  document.addEventListener("change", (event) => {
    const input = event.target;
    if (!(input instanceof HTMLInputElement) || input.type !== "file" || !input.closest("#ce-left")) return;
    message(null);
    const files = [...input.files];
    const large = files.find((file) => file.size > maxBytes);
    if (large) {
      event.stopImmediatePropagation();
      event.preventDefault();
      input.value = "";
      const mb = (maxBytes / 1e6).toFixed(0);
      const text = (texts().tooBig || "{name}: over {mb} MB").replace("{name}", large.name).replace("{mb}", mb);
      message(note("ce-error ce-said-text", "alert", text));
    } else if (files.length) {
      message(note("ce-status", "status", `${texts().uploading || ""} ${files.map((file) => file.name).join(" + ")}`));
    }
  }, true);

  const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    const area = event.target instanceof Element && event.target.closest("#ce-left");
    event.dataTransfer.dropEffect = area ? "copy" : "none";
    document.body.classList.toggle("ce-dragging", Boolean(area));
  }, true);
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("ce-dragging");
  });
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault(); // a file dropped beside the area must not replace the page
    document.body.classList.remove("ce-dragging");
    const input = chooser();
    if (!(event.target instanceof Element) || !event.target.closest("#ce-left") || !input) return;
    event.stopPropagation();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, true);

  // The page's state ------------------------------------------------------------------------------------------

  new MutationObserver((changes) => {
    const header = find(".ce-header");
    if (header && document.documentElement.lang !== header.dataset.language) {
      document.documentElement.lang = header.dataset.language;
    }
    for (const change of changes) {
      const place = change.target instanceof Element ? change.target : change.target.parentElement;
      if (place && place.closest("#ce-stage")) { wanted = null; message(null); break; }
      if (place && place.closest("#ce-message")) { message(null); break; }
    }
    paint();
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
