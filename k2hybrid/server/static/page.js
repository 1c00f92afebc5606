// Asks /status every second and shows what it says. Whatever came from elsewhere becomes text, never markup.

const POLL_MS = 1000;
const MOST_WAIT_MS = 5000; // between two tries while the server is away
const TIMEOUT_MS = 8000;
const FILL_WINDOW_MS = 15000; // that the rate of filling looks back
const LEAST_WINDOW_MS = 2000;
const KEY_NAME = "k2hybrid key"; // in sessionStorage: gone with the tab
const UNKNOWN = "–";

const PLACES = {
  mapped: "Mapped: read in place from the model's files, through the page cache.",
  resident: "Resident: in memory of the server's own.",
  streamed: "Streamed: in a bounded number of slots, read from disk as they are needed.",
};

const at = (id) => document.getElementById(id);
const base = new URL(".", location.href).href.replace(/\/$/, "");

// --- words and numbers ------------------------------------------------------------------------------------

const known = (value) => typeof value === "number" && Number.isFinite(value);

function number(value, digits = 0) {
  if (!known(value)) return UNKNOWN;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// Three figures say enough, and keep their width.
const rate = (value) => number(value, known(value) && value < 99.95 ? 1 : 0);
const percent = (share, digits = 0) => (known(share) ? `${number(100 * share, digits)} %` : UNKNOWN);

function bytes(value, digits = 1) {
  if (!known(value)) return UNKNOWN;
  return value < 1e9 ? `${number(value / 1e6, value < 1e8 ? digits : 0)} MB` : `${number(value / 1e9, digits)} GB`;
}

function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

function ofAll(part, all, text = number) {
  return known(part) && known(all) ? `${text(part)} of ${text(all)}` : UNKNOWN;
}

// A change of text is told to those who listen, so what stays the same is left alone.
function show(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

function reveal(selector, visible) {
  for (const element of document.querySelectorAll(selector)) element.hidden = !visible;
}

// --- the figures ------------------------------------------------------------------------------------------

function showServer(server) {
  document.title = `${server.model} – k2hybrid`;
  show("model", server.model);
  show("version", server.version);
  show("uptime", duration(server.uptime_s));
  show("context", number(server.context_tokens));
  if (!server.draining) connection("good", "Running");
  else connection("bad", `Shutting down; answers under way: ${number(server.answers)}`);
}

function showEngine(engine) {
  show("decode", rate(engine.decode_tokens_per_s));
  show("prefill", rate(engine.prefill_tokens_per_s));
  show("running", number(engine.running));
  show("waiting", number(engine.waiting));
  show("busy", percent(engine.busy));
  show("read-rate", known(engine.read_gb_s) ? `${number(engine.read_gb_s, 1)} GB/s` : UNKNOWN);
  show("prompt-tokens", number(engine.prompt_tokens));
  const share = engine.prompt_tokens ? ` (${percent(engine.cached_tokens / engine.prompt_tokens)})` : "";
  show("cached-tokens", number(engine.cached_tokens) + share);
  show("completion-tokens", number(engine.completion_tokens));
  show("finished", number(Object.values(engine.finished).reduce((sum, count) => sum + count, 0)));
}

let samples = []; // of a fill under way: {ms, done}

// Experts a second over the last moments; undefined until enough of them were seen.
function fillRate(done) {
  const ms = performance.now();
  if (samples.length && done < samples[samples.length - 1].done) samples = []; // another process
  samples.push({ ms, done });
  samples = samples.filter((sample) => ms - sample.ms < FILL_WINDOW_MS);
  const seconds = (ms - samples[0].ms) / 1000;
  return seconds * 1000 < LEAST_WINDOW_MS ? undefined : (done - samples[0].done) / seconds;
}

function showExperts(experts) {
  const size = (count) => bytes(count * experts.expert_bytes);
  const slotted = known(experts.slots);
  show("place", PLACES[experts.place] ?? experts.place);
  show("experts-all", known(experts.experts) ? `${number(experts.experts)}, ${size(experts.experts)}` : UNKNOWN);
  reveal(".slots", slotted);
  reveal(".streamed", experts.place === "streamed");
  reveal(".filling, #fill", slotted && experts.filling);
  show("experts-filled", ofAll(experts.filled, experts.slots));
  show("experts-read", bytes(experts.bytes_read));
  show("hit-rate", percent(experts.hit_rate, 1));
  show("misses", number(experts.misses));
  if (!slotted || !experts.filling) {
    samples = [];
    return;
  }
  const { fill_done: done, to_fill: all } = experts;
  const perSecond = fillRate(done);
  at("fill-bar").max = Math.max(1, all);
  at("fill-bar").value = done;
  const share = percent(Math.floor((100 * done) / all) / 100); // 100 % when all are there
  show("fill-text", `${ofAll(done, all, size)} filled, ${share}; the rest is read from its files meanwhile`);
  show("fill-rate", known(perSecond) ? `${size(perSecond)}/s` : UNKNOWN);
  show("fill-left", perSecond > 0 ? duration((all - done) / perSecond) : UNKNOWN);
}

function showDevice(device) {
  const held = Object.entries(device.holds ?? {});
  const sum = (rows) => rows.reduce((total, [, some]) => total + some, 0);
  reveal(".device", held.length > 0);
  reveal(".hot", device.hot_slots > 0);
  show("device-name", device.name);
  show("device-signal", device.signal ?? UNKNOWN);
  show("device-bytes", bytes(sum(held)));
  show("device-weights", bytes(sum(held.filter(([name]) => name.startsWith("weights:")))));
  show("device-chunk", number(device.chunk));
  show("device-recorded", (device.recorded ?? []).map((rows) => number(rows)).join(", ") || "none yet");
  show("hot-experts", ofAll(device.hot_experts, device.hot_slots));
  show("hot-found", percent(device.hot_found, 1));
}

function showLatents(latents) {
  const some = (pages) => `${number(pages)} (${percent(pages / latents.pages, 1)})`;
  show("latents-used", some(latents.used));
  show("latents-kept", some(latents.kept));
  show("latents-free", some(latents.free));
  show("latents-all", number(latents.pages * latents.page_tokens));
  show("latents-rows", latents.rows);
}

function showMemory(memory) {
  show("memory-private", bytes(memory.private_bytes));
  show("memory-mapped", bytes(memory.mapped_bytes));
  show("memory-available", bytes(memory.available_bytes));
  show("memory-total", bytes(memory.total_bytes));
}

function showTrouble({ engine, experts, weights, journal }) {
  const found = [
    ...weights.lost_files.map((name) => `${name}: bytes are lost; put the whole file back in its place`),
    ...(journal.enabled && !journal.writing ? [`Nothing is written in the journal: ${journal.last_error}`] : []),
    [experts.fill_failed, "experts could not be brought into memory; they are read from their files"],
    [experts.lost, "reads of an expert failed"],
    [engine.finished.error, "requests ended in an error"],
    [engine.failed_steps, "passes failed"],
    [engine.integrity_errors, "errors of the server's own; the log has them"],
  ];
  const lines = found
    .filter((entry) => typeof entry === "string" || entry[0] > 0)
    .map((entry) => (typeof entry === "string" ? entry : `${number(entry[0])} ${entry[1]}`));
  reveal("#trouble", lines.length > 0);
  const list = at("troubles");
  if (lines.join("\n") === [...list.children].map((item) => item.textContent).join("\n")) return;
  list.replaceChildren(
    ...lines.map((line) => {
      const item = document.createElement("li");
      item.textContent = line;
      return item;
    }),
  );
}

function showUse(server) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const body = JSON.stringify({ model: server.model, messages: [{ role: "user", content: "Hello" }] });
  show("model-id", server.model);
  show(
    "curl",
    [
      `curl ${base}/v1/chat/completions`,
      "-H 'Content-Type: application/json'",
      ...(server.key_required ? ['-H "Authorization: Bearer $API_KEY"'] : []),
      `-d ${quoted(body)}`,
    ].join(" \\\n  "),
  );
  for (const link of document.querySelectorAll("a.guarded")) {
    if (server.key_required) link.removeAttribute("href"); // a link brings no key
  }
  reveal("#guarded-note", server.key_required);
  reveal("#use", true);
}

let version = null;

function render(status) {
  if (version !== null && version !== status.server.version) location.reload(); // this page is of the old one
  version = status.server.version;
  showServer(status.server);
  showEngine(status.engine);
  showExperts(status.experts);
  showDevice(status.device);
  showLatents(status.latents);
  showMemory(status.memory);
  showTrouble(status);
  showUse(status.server);
}

// --- asking -----------------------------------------------------------------------------------------------

let key = stored();
let failures = 0; // in a row
let lost = null; // the time of the first of them
let timer = null;
let asking = false;

function stored() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  } catch {
    return ""; // storage is off: the key lives as long as the page
  }
}

function remember(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // as above
  }
}

function connection(kind, text) {
  at("connection").className = kind;
  show("connection", text);
}

function askForKey() {
  const refused = key !== "";
  remember("");
  connection("", "Waiting for a key");
  at("figures").hidden = true;
  at("key-form").hidden = false;
  show("key-problem", refused ? "The server did not take this key." : "");
  at("key").focus();
}

// What keeps figures from coming, in words; the last ones stay, as what was.
function away(words) {
  failures += 1;
  lost ??= new Date().toLocaleTimeString();
  connection("bad", `${words} since ${lost}; trying again`);
  at("figures").classList.add("stale");
  samples = [];
}

async function poll() {
  timer = null;
  if (asking) return;
  asking = true;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer = null;
  let status = null;
  try {
    const signal = AbortSignal.timeout(TIMEOUT_MS);
    answer = await fetch(`${base}/status`, { headers, cache: "no-store", signal });
    if (answer.ok) status = await answer.json();
  } catch {
    answer = null;
  }
  asking = false;
  if (answer?.status === 401) {
    askForKey(); // and ask no more until there is one
    return;
  }
  if (status === null) {
    away(answer === null ? "The server does not answer" : `The server answers ${answer.status}`);
    later();
    return;
  }
  failures = 0;
  lost = null;
  at("key-form").hidden = true;
  at("figures").hidden = false;
  at("figures").classList.remove("stale");
  later();
  render(status);
}

function later() {
  if (document.hidden || timer !== null) return;
  timer = setTimeout(poll, Math.min(MOST_WAIT_MS, POLL_MS * 2 ** Math.max(0, failures - 3)));
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const entered = at("key").value.trim();
  at("key").value = "";
  // A header holds ASCII alone; a key that is none cannot be right.
  if (/^[\x21-\x7e]+$/.test(entered)) {
    remember(entered);
    poll();
  } else {
    show("key-problem", "A key is ASCII text without blanks.");
  }
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && timer === null && at("key-form").hidden) poll();
});

if (navigator.clipboard) {
  at("copy").hidden = false;
  at("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(at("curl").textContent);
    show("copy", "Copied");
    setTimeout(() => show("copy", "Copy"), 2000);
  });
}

show("openai-url", `${base}/v1`);
show("anthropic-url", base);
poll();
