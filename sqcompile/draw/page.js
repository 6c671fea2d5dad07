// The drawing as a whole: which stages are shown, what is chosen, what is found.

const $ = css => root.querySelector(css);
const button = name => $(`[data-do="${name}"]`);
const pressed = (b, on) => b.setAttribute("aria-pressed", on ? "true" : "false");
const whole = root.hasAttribute("data-page"), framed = parent !== window;
const panesAt = $(".sqd-panes"), details = $(".sqd-details"), note = $(".sqd-note"), search = $("input"), status = $(".sqd-found");
const state = {full: button("full").getAttribute("aria-pressed") === "true", keys: [], query: "", at: -1};
let data, active;

// The drawings and texts, unpacked.
const ready = (async () => {
  const packed = Uint8Array.from(atob($(".sqd-data").textContent.trim()), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  data = JSON.parse(await new Response(stream).text());
  for (const stage of Object.values(data.stages)) {
    for (const [name, n] of Object.entries(stage.nodes)) {
      n.own = [name, n.label, n.block, ...n.names].join(" ").toLowerCase();
      n.sites = n.facts.filter(f => f[1].includes("->")).map(f => f[1]).join(" ").toLowerCase();
    }
    stage.first = new Map(Object.entries(stage.copies).flatMap(([first, copies]) => copies.map(c => [c, first])));
  }
  return data;
})();

const onEnter = {
  wheel: e => (whole && !framed) || e.ctrlKey || e.metaKey || root.contains(document.activeElement),
  // Keys come to the whole of a page, and to a part of one where its user is.
  focus: () => { if (((whole && !framed) || root.dataset.used) && !root.contains(document.activeElement)) root.focus({preventScroll: true}); },
};

function addPane(element, stage) {
  const pane = makePane(element, stage, {
    onEnter, onRepeat: () => setFull(true), onChoose: name => choose(pane, name),
    onHover(text, e) {
      note.hidden = !text;
      if (!text) return;
      note.textContent = text;
      note.style.left = Math.min(e.clientX + 14, Math.max(0, innerWidth - note.offsetWidth - 8)) + "px";
      note.style.top = Math.min(e.clientY + 16, Math.max(0, innerHeight - note.offsetHeight - 8)) + "px";
    },
  });
  element.addEventListener("pointerdown", () => { active = pane; });
  element.addEventListener("focusin", () => { active = pane; });
  return pane;
}
const panes = [addPane($(".sqd-pane"), $(".sqd-pane").dataset.stage)];
active = panes[0];
active.draw();
ready.then(() => say(active));

const drawing = pane => data.stages[pane.stage];
const isFull = pane => state.full || !drawing(pane).folded;
// The box that stands for a node as a pane is drawn.
const shown = (pane, name) => isFull(pane) ? name : drawing(pane).first.get(name) || name;

// What each box says to those who hear it, and where the pointer is.
function say(pane) {
  const {nodes, copies} = drawing(pane);
  for (const [name, n] of Object.entries(nodes)) {
    const many = !isFull(pane) && copies[name] ? `, one of ${copies[name].length} equal blocks` : "";
    if (pane.box(name)) pane.box(name).setAttribute("aria-label", n.says + many);
  }
}

async function redraw(pane) {
  await ready;
  pane.draw(isFull(pane) ? drawing(pane).full : drawing(pane).folded);
  say(pane);
  pane.element.setAttribute("aria-label", pane.stage);
  mark();
}

// The boxes of the chosen thing in every pane: a linear has one in each stage.
function mark() {
  for (const pane of panes) {
    const names = Object.entries(drawing(pane).nodes)
      .filter(([name, n]) => name === state.name || n.keys.some(k => state.keys.includes(k))).map(([name]) => shown(pane, name));
    pane.mark("sqd-chosen", new Set(names));
    pane.chosen = names[0];
    pane.mark("sqd-hit", new Set(state.query ? hits(pane) : []));
  }
}

async function choose(pane, name) {
  await ready;
  active = pane;
  const {nodes, copies} = drawing(pane), folded = !isFull(pane) && copies[name];
  state.name = name;
  state.keys = nodes[name].keys;
  mark();
  const of = Object.fromEntries((folded || [name]).map(c => [c, nodes[c]]));
  showDetails(details, nodes[name], of, to => go(pane, to));
  for (const other of panes) if (other !== pane && other.chosen) other.reveal(other.box(other.chosen));
  root.dispatchEvent(new CustomEvent("sqd-chosen", {detail: name, bubbles: true}));
}

function close() {
  state.name = undefined;
  state.keys = [];
  details.replaceChildren(make("p", "Choose a box to read its operations, its site and its numbers."));
  mark();
}

// To a node, which is drawn for it.
async function go(pane, name) {
  if (!pane.box(name)) await setFull(true);
  pane.reveal(pane.box(name));
  await choose(pane, name);
}

async function setFull(full) {
  await ready;
  state.full = full;
  pressed(button("full"), full);
  for (const pane of panes) {
    if (!drawing(pane).folded) continue;
    await redraw(pane);
    if (pane.chosen) pane.reveal(pane.box(pane.chosen));
  }
}

async function setStage(pane, stage) {
  await ready;
  if (!data.stages[stage]) return;
  pane.stage = pane.element.dataset.stage = stage;
  await redraw(pane);
  for (const b of stageButtons(pane)) pressed(b, b.dataset.stage === stage);
  if (pane === panes[0]) $(".sqd-legend").innerHTML = data.stages[stage].legend;
  if (pane.chosen) {
    pane.reveal(pane.box(pane.chosen));
    await choose(pane, pane.chosen);
  }
}
const stageButtons = pane => (pane === panes[0] ? $(".sqd-bar") : pane.element).querySelectorAll("button[data-stage]");

async function compare() {
  await ready;
  if (panes.length > 1) {
    panes.pop().element.remove();
    active = panes[0];
  } else if (button("compare").disabled || panesAt.clientWidth < 480) return;
  else {
    const names = Object.keys(data.stages), last = names[names.length - 1];
    const stage = last === panes[0].stage ? names[0] : last;
    const element = make("section", undefined, "sqd-pane"), choice = make("span");
    choice.setAttribute("role", "group");
    choice.setAttribute("aria-label", "Stage beside it");
    for (const b of $(".sqd-bar").querySelectorAll("button[data-stage]")) choice.append(b.cloneNode(true));
    element.append(choice, make("div", undefined, "sqd-canvas"));
    panesAt.append(element);
    panes.push(addPane(element, stage));
    await setStage(panes[1], stage);
  }
  pressed(button("compare"), panes.length > 1);
  for (const pane of panes) {
    pane.start();
    if (pane.chosen) pane.reveal(pane.box(pane.chosen));
  }
}

// The nodes that have all words of the query in their names, else those with such a site. If some are drawn, they alone.
function hits(pane) {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const having = where => Object.entries(drawing(pane).nodes).filter(([, n]) => words.every(w => n[where].includes(w))).map(([x]) => x);
  const own = having("own"), found = own.length ? own : having("sites");
  const drawn = found.filter(name => pane.box(name));
  return drawn.length ? drawn : found;
}

async function find(step) {
  await ready;
  state.query = search.value.trim();
  const found = state.query ? hits(active) : [];
  state.at = found.length ? (state.at + step + found.length) % found.length : -1;
  mark();
  status.textContent = !state.query ? "" : found.length ? `${state.at + 1} of ${found.length}` : "not found";
  if (found.length) await go(active, found[state.at]);
}

search.addEventListener("focus", async () => {
  await ready;
  const names = new Set(Object.values(drawing(active).nodes).flatMap(n => n.names.length ? n.names : [n.label]));
  $("datalist").replaceChildren(...[...names].map(n => { const o = make("option"); o.value = n; return o; }));
}, {once: true});
search.addEventListener("input", () => { state.at = -1; if (!search.value) find(1); });
search.addEventListener("keydown", e => {
  if (e.key === "Enter") { e.preventDefault(); find(e.shiftKey ? -1 : 1); }
  if (e.key === "Escape") { search.value = ""; find(1); root.focus(); }
  e.stopPropagation();
});

function setDb(on) {
  root.classList.toggle("sqd-db", on);
  pressed(button("db"), on);
}
const actions = {
  compare, full: () => setFull(!state.full), db: () => setDb(!root.classList.contains("sqd-db")),
  in: () => active.zoomAt(1.25), out: () => active.zoomAt(0.8), fit: () => panes.forEach(p => p.look(p.size())),
};
root.addEventListener("click", async e => {
  const b = e.target.closest("button");
  if (!b || b.disabled) return;
  if (b.dataset.do) await actions[b.dataset.do]();
  else if (b.dataset.stage) await setStage(panes.find(p => p.element.contains(b)) || panes[0], b.dataset.stage);
  else if (b.dataset.reason) {
    await ready;
    const linears = new Set(data.reasons[b.dataset.reason].linears);
    const of = pane => Object.entries(drawing(pane).nodes).filter(([, n]) => n.names.some(x => linears.has(x))).map(([x]) => shown(pane, x));
    state.query = "";
    for (const pane of panes) { pane.mark("sqd-hit", new Set(of(pane))); pane.gather(of(pane)); }
  }
});
root.addEventListener("pointerdown", () => { root.dataset.used = "true"; });
(whole ? document : root).addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === "INPUT") return;
  const letters = {c: "compare", e: "full", d: "db"}, stage = Object.keys(data ? data.stages : {})[+e.key - 1];
  if (e.key === "Escape") close();
  else if (e.key === "/") search.focus();
  else if (letters[e.key] && !button(letters[e.key]).disabled) actions[letters[e.key]]();
  else if (stage) setStage(active, stage);
  else if (e.target.tagName === "PRE" || !active.key(e)) return;
  e.preventDefault();
});
if (whole && !framed) root.focus({preventScroll: true});
ready.then(() => { root.dataset.ready = ""; });
