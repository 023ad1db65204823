"use strict";
// Reads status.json every two seconds and history.json every ten; changes what is there in place, so that the
// keyboard's place and what a screen reader reads stay where they are.
const EVERY_MS = 2000, HISTORY_EVERY = 5, SVG = "http://www.w3.org/2000/svg", WIDTH = 360, HEIGHT = 100;
const $ = (id) => document.getElementById(id);
const number = (n, digits = 0) => n == null ? "unknown" : n.toLocaleString("en", { maximumFractionDigits: digits });
const short = (n) => n == null ? "unknown" : n !== 0 && Math.abs(n) < 10 ? number(n, 1) : number(n);
const bytes = (n) => n == null ? "unknown" : n < 1048576 ? number(n / 1024) + " kB"
  : n < 1073741824 ? number(n / 1048576, 1) + " MB" : number(n / 1073741824, 1) + " GB";
const span = (s) => s == null ? "unknown" : s < 10 ? number(s, 1) + " s" : s < 120 ? number(s) + " s"
  : s < 7200 ? number(s / 60) + " min" : s < 172800 ? number(s / 3600, 1) + " h" : number(s / 86400) + " d";
const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
const quantity = (n, unit) => unit === "s" ? span(n) : n == null ? "unknown" : short(n) + (unit === "/s" ? "/s" : " " + unit);

function make(name, text, kind) {
  const element = document.createElement(name);
  if (text != null) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}
function say(element, text) { if (element.textContent !== text) element.textContent = text; }
function draw(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
const list = (id, lines) => $(id).replaceChildren(...(lines.length ? lines : ["none"]).map((line) => make("li", line)));

// --- figures

const figures = new Map(); // section and title -> its elements
function valueOf(card) {
  if (typeof card.value === "string") return [card.value, ""];
  if (card.unit === "bytes") return [bytes(card.value), ""];
  if (card.unit === "s" || card.unit === "s ago") return [span(card.value) + card.unit.slice(1), ""];
  return [number(card.value), card.value == null ? "" : card.unit];
}
function figure(section, card, explained) {
  const key = section + "\n" + card.title;
  let found = figures.get(key);
  if (!found) {
    const box = make("div"), value = make("dd", null, "value"), text = document.createTextNode(""), unit = make("small");
    const tip = make("dd", explained ?? "", "tip");
    tip.id = "tip-" + figures.size;
    tip.setAttribute("role", "tooltip");
    value.append(text, unit);
    box.tabIndex = 0;
    box.setAttribute("aria-describedby", tip.id);
    box.append(make("dt", card.title), value, tip);
    figures.set(key, found = { box, text, unit });
  }
  const [text, unit] = valueOf(card);
  if (found.text.data !== text + " ") found.text.data = text + " ";
  say(found.unit, unit);
  found.box.className = card.bad ? "alarm" : "";
  return found.box;
}
const sections = new Map();
function showFigures(status) {
  for (const [title, cards] of Object.entries(status.cards)) {
    if (!sections.has(title)) {
      const section = make("section"), dl = make("dl");
      section.append(make("h2", title), dl);
      sections.set(title, dl);
      $("cards").append(section);
    }
    const dl = sections.get(title), boxes = cards.map((card) => figure(title, card, status.explained[card.title]));
    if (boxes.length !== dl.children.length || boxes.some((box, n) => dl.children[n] !== box)) dl.replaceChildren(...boxes);
  }
}

// --- charts

const SOON_S = 900; // a service that is younger is shown by ten minutes, until somebody chooses
let history = [], chosen = 1, isChosen = false;
const charts = new Map(); // title -> its elements and what it shows
const pointsOf = (spec) => history[chosen]?.series[spec.lines[0] ?? spec.band?.[0]]?.length ?? 0;
function chartOf(spec, explained) {
  let chart = charts.get(spec.title);
  if (chart) { chart.spec = spec; return chart; }
  const box = make("figure"), caption = make("figcaption"), plot = make("div", null, "plot"), ends = make("div", null, "ends");
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const tip = make("div", explained ?? "", "tip"), names = spec.band ? [spec.band.join(" to ")] : spec.lines;
  const keys = names.map((_, n) => make("span", null, n ? "key two" : "key"));
  chart = { spec, box, svg, top: make("span", null, "top"), keys, names, from: make("span"), to: make("span"), at: null };
  tip.id = "chart-tip-" + charts.size;
  tip.setAttribute("role", "tooltip");
  caption.append(make("b", spec.title), ...keys);
  ends.append(chart.from, chart.to);
  plot.append(svg, chart.top);
  box.append(caption, plot, ends, tip);
  box.tabIndex = 0;
  box.setAttribute("role", "img");
  box.setAttribute("aria-describedby", tip.id);
  box.addEventListener("keydown", (event) => {
    const points = pointsOf(spec);
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -points, End: points }[event.key];
    if (!step || !points) return;
    event.preventDefault();
    chart.at = Math.max(0, Math.min(points - 1, (chart.at ?? points - 1) + step));
    showChart(chart);
  });
  plot.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect(), points = pointsOf(spec);
    if (!points) return;
    chart.at = Math.max(0, Math.min(points - 1, Math.round((event.clientX - area.left) / area.width * (points - 1))));
    showChart(chart);
  });
  for (const leave of ["pointerleave", "blur"]) (leave === "blur" ? box : plot).addEventListener(leave, () => { chart.at = null; showChart(chart); });
  $("charts").append(box);
  charts.set(spec.title, chart);
  return chart;
}
function path(points, x, y) { // a gap where nothing is known; a lone point is a short dash
  let text = "", open = false;
  points.forEach((n, i) => {
    if (n == null) { open = false; return; }
    text += `${open ? "L" : "M"}${x(i).toFixed(1)},${y(n).toFixed(1)}` + (open ? "" : "h.5");
    open = true;
  });
  return text;
}
function bandPath(low, high, x, y) {
  let text = "", from = -1;
  const close = (to) => {
    if (from < 0) return;
    const there = [], back = [];
    for (let i = from; i < to; i++) { there.push(`${x(i).toFixed(1)},${y(high[i] ?? low[i]).toFixed(1)}`); back.unshift(`${x(i).toFixed(1)},${y(low[i]).toFixed(1)}`); }
    text += `M${there.join("L")}h.5L${back.join("L")}Z`;
    from = -1;
  };
  low.forEach((n, i) => { if (n == null) close(i); else if (from < 0) from = i; });
  close(low.length);
  return text;
}
function showChart(chart) {
  const { spec, svg } = chart, past = history[chosen];
  if (!past) return;
  const series = (spec.band ?? spec.lines).map((name) => past.series[name] ?? []);
  const known = series.flat().filter((n) => n != null), greatest = Math.max(...known, spec.unit === "/s" ? 1 : 0.001);
  const nearLimit = spec.limit != null && greatest > spec.limit / 5, high = nearLimit ? Math.max(greatest, spec.limit) : greatest;
  const x = (i) => i * WIDTH / (series[0].length - 1), y = (n) => HEIGHT - 1 - (HEIGHT - 2) * n / high;
  const shapes = [draw("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 })];
  if (spec.band) shapes.push(draw("path", { class: "band", d: bandPath(series[0], series[1], x, y) }));
  else series.forEach((points, n) => shapes.push(draw("path", { class: n ? "two" : "one", d: path(points, x, y) })));
  if (nearLimit) shapes.push(draw("line", { class: "limit", x1: 0, x2: WIDTH, y1: y(spec.limit), y2: y(spec.limit) }));
  if (chart.at != null) shapes.push(draw("line", { class: "at", x1: x(chart.at), x2: x(chart.at), y1: 0, y2: HEIGHT }));
  svg.replaceChildren(...shapes);
  const last = series[0].length - 1, at = chart.at ?? last, when = past.at - (last - at) * past.step_s;
  // The newest point is the mean of a few seconds only, or still empty: then the one before it is the present.
  const shown = (points) => points[at] ?? (chart.at == null ? points[at - 1] : null);
  const words = spec.band ? [`${short(shown(series[0]))} to ${quantity(shown(series[1]), spec.unit)}`]
    : series.map((points) => spec.unit === "entries" ? short(shown(points)) : quantity(shown(points), spec.unit));
  const time = chart.at == null ? "" : clock(when) + " ";
  chart.keys.forEach((key, n) => say(key, `${time}${chart.names[n]} ${words[n]}`));
  say(chart.top, known.length ? quantity(high, spec.unit) + (nearLimit && high === spec.limit ? ", the limit" : "") : "nothing yet");
  say(chart.from, clock(past.at - last * past.step_s));
  say(chart.to, "now");
  const most = known.length ? `, at most ${quantity(greatest, spec.unit)}` : "";
  chart.box.setAttribute("aria-label", `${spec.title}, ${time || "now "}${chart.names.map((name, n) => `${name} ${words[n]}`).join(", ")}${most}`);
}

// --- tables: heads are [words, kind]; a row may be {cells, bad}

function table(id, caption, heads, rows) {
  const head = make("thead"), body = make("tbody"), top = make("tr");
  for (const [words, kind] of heads) {
    const cell = make("th", words, kind);
    cell.scope = "col";
    top.append(cell);
  }
  head.append(top);
  for (const { cells, bad } of rows) {
    const line = make("tr", null, bad ? "alarm" : "");
    cells.forEach((text, n) => {
      const cell = make("td", null, heads[n][1]), inner = make("span", text);
      cell.dataset.head = heads[n][0];
      cell.append(inner);
      line.append(cell);
    });
    body.append(line);
  }
  if (!rows.length) {
    const cell = make("td", "none", "text");
    cell.colSpan = heads.length;
    cell.dataset.head = "";
    body.append(make("tr"));
    body.firstChild.append(cell);
  }
  $(id).setAttribute("aria-label", caption);
  $(id).replaceChildren(head, body);
}

function showTables(s) {
  table("waits", "What waits", [["what", "text"], ["how many"], ["the oldest"]],
    s.waits.map((w) => ({ bad: w.bad, cells: [w.what, number(w.count), w.count && w.oldest_s != null ? span(w.oldest_s) : "-"] })));
  table("processes", "Processes", [["process", "text"], ["state", "text"], ["events/s"], ["finished"], ["flush ms"], ["oldest s"], ["memory"], ["restarts"]],
    s.processes.map((p) => ({ bad: !p.ready && p.name !== "monitor", cells: [p.name, p.state, number(p.entries_per_s), number(p.entries), number(p.flush_ms),
      number(p.oldest_unflushed_s, 1), bytes(p.memory_bytes), number(p.restarts)] })));
  $("of-workers").hidden = !s.workers.length;
  table("workers", "Workers on this stream", [["host:pid", "text"], ["version", "text"], ["state", "text"], ["events/s"], ["processes"], ["told"]],
    s.workers.map((w) => ({ bad: !w.ready, cells: [w.owner, w.version, w.ready ? "ready" : "not ready", number(w.entries_per_s), number(w.processes), span(w.told_s) + " ago"] })));
  $("of-tables").hidden = !s.written.length;
  table("written", "What was written", [["table", "text"], ["collections", "text"], ["changes/s"], ["last hour"]],
    s.written.map((w) => ({ cells: [w.table, w.collections.join(", ") || "-", short(w.per_s), number(w.last_hour)] })));
  list("errors", s.processes.filter((p) => p.error).map((p) => p.name + (p.error_age_s == null ? "" : `, ${span(p.error_age_s)} ago`) + ": " + p.error));
  list("drops", Object.entries(s.drops).filter(([, n]) => n).sort((a, b) => b[1] - a[1]).map(([reason, n]) => `${number(n)} ${reason}`));
  table("letters", "Newest dead letters", [["reason", "text"], ["set aside at", "text"], ["id", "text"], ["error", "text"]],
    s.dead_letters.map((l) => ({ cells: [l.reason, l.set_aside_at.slice(0, 19).replace("T", " "), l.id, l.error] })));
}

// --- the whole

let latest = null; // when the newest answer came, by this machine's clock
function state(words, kind) { say($("state"), words); $("state").className = "state " + kind; }
function stale(words) {
  $("stale").hidden = !words;
  say($("stale"), words);
  document.body.classList.toggle("stale", Boolean(words));
}
function show(s) {
  document.title = (s.ready ? "" : "! ") + "fastworker " + s.service;
  say($("version"), s.version + " " + s.service);
  say($("uptime"), "up for " + span(s.uptime_s));
  state(s.ready ? "ready" : "not ready", s.ready ? "good" : "bad");
  if ($("why").textContent !== s.why.join("")) $("why").replaceChildren(...s.why.map((reason) => make("li", reason)));
  stale(s.age_s > s.stale_s ? `Redis has not answered for ${span(s.age_s)}: these figures are as old.` : "");
  for (const spec of s.charts) chartOf(spec, s.explained[spec.title]);
  if (!isChosen && chosen !== (s.uptime_s < SOON_S ? 0 : 1)) choose(s.uptime_s < SOON_S ? 0 : 1);
  showFigures(s);
  showTables(s);
}
function withTenMinutes([hour, ...others]) { // the end of the hour
  const series = Object.entries(hour.series).map(([name, points]) => [name, points.slice(-600 / hour.step_s)]);
  return [{ ...hour, series: Object.fromEntries(series) }, hour, ...others];
}
function choose(span) {
  chosen = span;
  for (const chart of charts.values()) chart.at = null;
  document.querySelector(`input[name=span][value="${span}"]`).checked = true;
  for (const chart of charts.values()) showChart(chart);
}
async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}
let turn = 0;
async function tick() {
  try {
    show(await ask("status.json"));
    if (turn++ % HISTORY_EVERY === 0) history = withTenMinutes(await ask("history.json"));
    latest = Date.now();
    for (const chart of charts.values()) showChart(chart);
  } catch (error) {
    turn = 0;
    state("no answer", "bad");
    document.title = "! fastworker: no answer";
    stale(latest ? `No answer for ${span((Date.now() - latest) / 1000)}: these figures are as old.` : "No answer yet.");
  }
  say($("age"), latest ? "latest answer " + span((Date.now() - latest) / 1000) + " ago" : "no answer yet");
  setTimeout(tick, EVERY_MS);
}
$("spans").addEventListener("change", (event) => { isChosen = true; choose(Number(event.target.value)); });
tick();
