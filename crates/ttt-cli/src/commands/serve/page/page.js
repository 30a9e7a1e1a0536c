// The page: completes, chats, watches the model learn, and keeps a shelf of states. It speaks to its own server only.

const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
};
const grouped = (n) => n.toLocaleString("en-US");
const size = (bytes) => (bytes < 1 << 20 ? `${(bytes / 1024).toFixed(0)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`);

let model = {};
let states = [];

// ---- The server.

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  if (options.json !== undefined) {
    headers["content-type"] = "application/json";
    options.body = JSON.stringify(options.json);
  }
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    $("key").hidden = false;
    const given = await ask("API key of this server", "", "password");
    if (given) {
      sessionStorage.setItem("key", given);
      return call(path, options);
    }
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

// Server-sent events of a response, as [kind, data].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.split(":")[0], line.slice(line.indexOf(":") + 2)]));
      if (fields.data && fields.data !== "[DONE]") {
        const data = JSON.parse(fields.data);
        if (data.error) throw new Error(data.error.message);
        yield [fields.event, data];
      }
    }
  }
}

function fail(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// What a button starts: errors are shown, a second start is refused while it runs.
function action(run) {
  let busy = false;
  return async (event) => {
    event?.preventDefault();
    if (busy) return;
    busy = true;
    $("error").hidden = true;
    try {
      await run(event);
    } catch (error) {
      fail(error);
    } finally {
      busy = false;
    }
  };
}

function ask(what, value, type = "text") {
  $("ask-what").textContent = what;
  Object.assign($("ask-input"), { value, type });
  $("ask").returnValue = "cancel";
  $("ask").showModal();
  $("ask-input").select();
  return new Promise((resolve) => {
    $("ask").addEventListener("close", () => resolve($("ask").returnValue === "ok" ? $("ask-input").value : null), { once: true });
  });
}

// ---- Tabs, and light or dark.

const tabs = [...document.querySelectorAll("[role=tab]")];
function show(name) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  $("error").hidden = true;
  history.replaceState(null, "", `#${name}`);
}
for (const [i, tab] of tabs.entries()) {
  tab.onclick = () => show(tab.getAttribute("aria-controls"));
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  };
}
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("theme").onclick = () => {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
};
$("key").onclick = action(async () => {
  const given = await ask("API key of this server", sessionStorage.getItem("key") ?? "", "password");
  if (given !== null) sessionStorage.setItem("key", given);
  await refresh();
});

// ---- Complete.

let running = null;
let last = null;
const sampling = () => {
  const seed = $("seed").value;
  return {
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    max_tokens: Number($("max-tokens").value),
    ...(seed !== "" && { seed: Number(seed) }),
  };
};
const after = (select) => ($(select).value ? { state_id: $(select).value } : {});

$("go").onclick = action(async () => {
  const given = $("prompt").value;
  const start = after("complete-start");
  running = new AbortController();
  $("stop").disabled = false;
  $("keep").disabled = true;
  $("usage").textContent = "reading …";
  $("output").replaceChildren(make("span", { className: "given", textContent: given }));
  last = { given, start, text: "" };
  const begun = performance.now();
  let count = 0;
  try {
    const json = { prompt: given, stream: true, stream_options: { include_usage: true }, logprobs: 5, ...sampling(), ...start };
    for await (const [, piece] of events(await call("v1/completions", { method: "POST", json, signal: running.signal }))) {
      const choice = piece.choices[0];
      if (choice) {
        last.text += choice.text;
        addTokens(choice);
        count += choice.logprobs?.tokens.length ?? 0;
      }
      const seconds = (performance.now() - begun) / 1000;
      $("usage").textContent = `${count} tokens, ${(count / seconds).toFixed(0)}/s`;
      if (piece.usage) {
        const { prompt_tokens, prompt_tokens_details: details } = piece.usage;
        $("usage").textContent += `; prompt of ${grouped(prompt_tokens)}, ${grouped(details.cached_tokens)} of them remembered`;
      }
    }
  } finally {
    $("stop").disabled = true;
    $("keep").disabled = model.read_only || !last.text;
  }
});
$("stop").onclick = () => running?.abort();
$("keep").onclick = action(() => keep({ ...last.start, prompt: last.given + last.text }, $("usage")));

// Keeps the state behind a text.
async function keep(request, note) {
  const name = await ask("Name of the state", "");
  if (name === null) return;
  const json = { ...request, max_tokens: 0, save_state: name || true };
  const answer = await (await call("v1/completions", { method: "POST", json })).json();
  note.textContent = `kept as ${name || answer.choices[0].state_id}`;
  await refresh();
}

// Tokens of a piece as spans that know what else was likely. A piece's text is that of all of its tokens.
function addTokens({ text, logprobs }) {
  const output = $("output");
  const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  const offsets = logprobs?.text_offset ?? [];
  const characters = [...text];
  if (!offsets.length) output.append(text);
  offsets.forEach((offset, i) => {
    const from = offset - offsets[0];
    const to = i + 1 < offsets.length ? offsets[i + 1] - offsets[0] : characters.length;
    const logprob = logprobs.token_logprobs[i];
    const span = make("span", { className: "token", textContent: characters.slice(from, to).join("") });
    if (logprob !== null && Math.exp(logprob) < 0.1) span.classList.add("unlikely");
    span.likely = { token: logprobs.tokens[i], logprob, top: logprobs.top_logprobs[i] ?? {} };
    output.append(span);
  });
  if (atEnd) output.scrollTop = output.scrollHeight;
}

function showLikely(span) {
  document.querySelector(".token.at")?.classList.remove("at");
  $("likely").hidden = !span?.likely;
  if (!span?.likely) return;
  span.classList.add("at");
  const { token, logprob, top } = span.likely;
  const all = Object.entries(top);
  if (!(token in top)) all.push([token, logprob]);
  $("likely").replaceChildren(
    ...all.map(([name, p]) => {
      const row = make("div", { className: name === token ? "chosen" : "" });
      const shown = name.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
      row.append(make("code", { textContent: shown }), make("meter", { value: Math.exp(p) }), make("span", { textContent: `${(100 * Math.exp(p)).toFixed(1)} %` }));
      return row;
    }),
  );
  const box = span.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - $("likely").offsetWidth - 8);
  $("likely").style.left = `${Math.max(8, left) + scrollX}px`;
  $("likely").style.top = `${box.bottom + scrollY + 4}px`;
}
$("output").onpointerover = (event) => showLikely(event.target.closest(".token"));
$("output").onpointerleave = () => showLikely(null);
$("output").onblur = () => showLikely(null);
$("output").onclick = (event) => showLikely(event.target.closest(".token"));
$("output").onkeydown = (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") showLikely(null);
  if (!step) return;
  event.preventDefault();
  const all = [...$("output").querySelectorAll(".token")];
  const at = all.findIndex((span) => span.classList.contains("at"));
  showLikely(all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, at + step))]);
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("go").click();
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("ask").open) running?.abort();
});

// ---- Chat. The conversation is in the page; the server remembers prefixes, so what was said before is not read again.

let messages = [];
const plainText = () => messages.map((m) => (m.role === "user" ? `${m.content}\n` : m.content.endsWith("\n") ? m.content : `${m.content}\n`)).join("");

function showMessages() {
  const rows = messages.map((m) => make("li", { className: m.role, textContent: m.content }));
  $("messages").replaceChildren(...rows);
  $("messages").scrollTop = $("messages").scrollHeight;
  $("chat-undo").disabled = messages.length === 0;
  $("chat-keep").disabled = messages.length === 0 || model.read_only || model.chat;
}
$("chat-form").onsubmit = action(async () => {
  const said = $("say").value;
  if (!said) return;
  messages.push({ role: "user", content: said });
  $("say").value = "";
  showMessages();
  const answer = { role: "assistant", content: "" };
  running = new AbortController();
  const base = { stream: true, ...sampling(), ...after("chat-start") };
  const [path, json] = model.chat
    ? ["v1/chat/completions", { ...base, messages }]
    : ["v1/completions", { ...base, prompt: plainText(), stop: ["\n\n"] }];
  try {
    const response = await call(path, { method: "POST", json, signal: running.signal });
    messages.push(answer);
    for await (const [, piece] of events(response)) {
      answer.content += piece.choices[0]?.delta?.content ?? piece.choices[0]?.text ?? "";
      showMessages();
    }
  } catch (error) {
    // What was not answered can be said again.
    if (messages.at(-1).role === "user") $("say").value = messages.pop().content;
    showMessages();
    throw error;
  }
});
$("say").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
};
$("chat-new").onclick = $("chat-start").onchange = () => {
  messages = [];
  showMessages();
};
$("chat-undo").onclick = () => {
  while (messages.length && messages.pop().role !== "user");
  showMessages();
};
$("chat-keep").onclick = action(() => keep({ ...after("chat-start"), prompt: plainText() }, $("chat-how")));

// ---- Learn.

let file = null;
function choose(chosen) {
  file = chosen;
  $("drop").querySelector("label").textContent = file ? `${file.name}, ${size(file.size)}` : "Drop a text file here, or choose one";
}
$("file").onchange = () => choose($("file").files[0] ?? null);
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) {
      choose(event.dataTransfer.files[0]);
      $("learn-go").click();
    }
  });
}

// One plot a layer: three lines over the tokens read, at most so many points wide.
const POINTS = 240;
class Plots {
  constructor() {
    this.rows = [];
    this.stride = 1;
    this.seen = 0;
    $("plots").replaceChildren();
  }
  add(inner) {
    if (this.seen++ % this.stride) return;
    this.rows.push(inner);
    if (this.rows.length > POINTS) {
      this.rows = this.rows.filter((_, i) => i % 2 === 0);
      this.stride *= 2;
    }
    const svg = (tag, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      return element;
    };
    inner.forEach((_, layer) => {
      let box = $("plots").children[layer];
      if (!box) {
        const picture = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": `inner losses of layer ${layer}` });
        for (const name of ["w0", "before", "after"]) picture.append(svg("polyline", { class: name }));
        box = make("div", {}, `layer ${layer}`, make("output"), picture);
        $("plots").append(box);
      }
      const values = this.rows.map((row) => row[layer]);
      const top = Math.max(...values.flat(), 1e-9);
      [...box.querySelectorAll("polyline")].forEach((line, k) => {
        const points = values.map((v, i) => `${values.length > 1 ? (100 * i) / (values.length - 1) : 0},${98 - (94 * v[k]) / top}`);
        line.setAttribute("points", points.join(" "));
      });
      const [, before, now] = values.at(-1);
      box.querySelector("output").textContent = `${before.toFixed(3)} → ${now.toFixed(3)}`;
    });
  }
}

$("learn-go").onclick = action(async () => {
  const text = $("text").value;
  if (!file && !text) throw new Error("choose a file or paste a text first");
  const name = $("learn-name").value || file?.name || text.trim().slice(0, 30).replaceAll(/\s+/g, " ");
  const query = new URLSearchParams({ name, stream: true, ...after("learn-start") });
  running = new AbortController();
  $("learn-stop").disabled = false;
  $("progress").hidden = $("losses").hidden = false;
  $("progress").value = 0;
  const plots = new Plots();
  try {
    const response = await call(`v1/states?${query}`, {
      method: "POST", body: file ?? text, headers: { "content-type": "text/plain" }, signal: running.signal,
    });
    for await (const [kind, data] of events(response)) {
      if (kind === "progress") {
        $("progress").value = data.of ? data.tokens / data.of : 1;
        if (data.inner.length) plots.add(data.inner);
        const speed = data.tokens_per_second ? `, ${grouped(Math.round(data.tokens_per_second))} a second` : "";
        $("learned").textContent = `${grouped(data.tokens)} of ${grouped(data.of)} tokens${speed}`;
      } else if (kind === "state") {
        const button = make("button", { textContent: "Ask it", onclick: () => use(data.id, "complete-start", "complete") });
        $("learned").replaceChildren(`learned ${grouped(data.tokens + data.pending)} tokens into “${data.name}”, ${size(data.bytes)} `, button);
        choose(null);
        $("file").value = $("text").value = $("learn-name").value = "";
        await refresh();
      }
    }
  } finally {
    $("learn-stop").disabled = true;
  }
});
$("learn-stop").onclick = () => running?.abort();

// ---- The shelf.

function use(id, select, tab) {
  $(select).value = id;
  $(select).onchange?.();
  show(tab);
}

async function refresh() {
  model = (await (await call("v1/models")).json()).data[0];
  const millions = model.parameters / 1e6;
  $("about").textContent = `${model.id}: ${millions < 10 ? millions.toFixed(1) : millions.toFixed(0)}M parameters, a state ${model.context ? `grows by ${size(model.state_bytes_per_token)} a token, up to ${grouped(model.context)} tokens` : `is ${size(model.state_bytes)}`}`;
  if (model.context) $("learn-note").textContent = "The model reads a text once. Its state grows with every token; ask it as often as you like.";
  $("chat-how").textContent = model.chat ? "" : "This model has no chat template: it continues the text, line by line.";
  states = (await (await call("v1/states")).json()).data;
  for (const select of document.querySelectorAll(".starts")) {
    const value = select.value;
    const options = states.map((s) => new Option(s.name ?? s.id, s.id));
    select.replaceChildren(new Option("nothing", ""), ...options);
    select.value = states.some((s) => s.id === value) ? value : "";
  }
  $("shelf-note").textContent = states.length ? "" : "No states yet: learn a text, or keep one behind a completion.";
  $("states").replaceChildren(...states.map(card));
  for (const id of ["learn-go", "upload"]) $(id).disabled = model.read_only;
}

function card(state) {
  const title = state.name ?? state.id;
  const parent = states.find((s) => s.id === state.parent);
  const button = (text, run) => make("button", { textContent: text, onclick: action(run), ariaLabel: `${text} ${title}` });
  const change = async (path, options) => {
    await call(`v1/states/${state.id}${path}`, options);
    await refresh();
  };
  const about = [
    `${grouped(state.tokens + state.pending)} tokens`, size(state.bytes), new Date(1000 * state.created).toLocaleString(),
    ...(parent ? [`from ${parent.name ?? parent.id}`] : []),
  ];
  return make("li", {},
    make("h2", { textContent: title }),
    make("p", { textContent: about.join(" · ") }),
    make("div", { className: "row" },
      button("Complete", () => use(state.id, "complete-start", "complete")),
      button("Chat", () => use(state.id, "chat-start", "chat")),
      button("Fork", async () => {
        const name = await ask("Name of the copy", `${title} (copy)`);
        if (name) await change("/fork", { method: "POST", json: { name } });
      }),
      button("Rename", async () => {
        const name = await ask("New name", title);
        if (name) await change("", { method: "PATCH", json: { name } });
      }),
      button("Download", async () => {
        const blob = await (await call(`v1/states/${state.id}/content`)).blob();
        const url = URL.createObjectURL(blob);
        make("a", { href: url, download: `${title.replaceAll(/[^\w.-]+/g, "-")}.state` }).click();
        setTimeout(() => URL.revokeObjectURL(url), 60_000);
      }),
      button("Delete", async () => {
        if (confirm(`Delete “${title}”?`)) await change("", { method: "DELETE" });
      }),
    ),
  );
}
$("upload").onchange = action(async () => {
  const chosen = $("upload").files[0];
  if (!chosen) return;
  try {
    const query = new URLSearchParams({ name: chosen.name });
    await call(`v1/states/upload?${query}`, { method: "POST", body: chosen, headers: { "content-type": "application/octet-stream" } });
    await refresh();
  } finally {
    $("upload").value = "";
  }
});

const wanted = location.hash.slice(1);
if (tabs.some((tab) => tab.getAttribute("aria-controls") === wanted)) show(wanted);
showMessages();
refresh().catch(fail);
