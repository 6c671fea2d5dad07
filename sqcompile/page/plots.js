// plots: the data of the page, its theme, and how vega draws. Vega itself is started by the first plot.
const $ = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

// The text that stands in an element, compressed.
async function unpacked(id) {
  const stream = new Blob([bytes($(id).textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

const DATA = JSON.parse(await unpacked("data"));
const SPECS = JSON.parse($("specs").textContent);
const L = DATA.layers;

// An element with attributes and children; text is never taken for HTML.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter(c => c != null));
  return node;
}

const plain = name => name.replace(/\.weight(?=#|$)/, "");
const number = (x, digits = 3) => x == null ? "–" : x === 0 ? "0" : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3
  ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
const percent = x => x == null ? "–" : x === 0 ? "0 %" : x < 1e-4 ? "< 0.01 %" : `${number(100 * x, 2)} %`;
// The SQNR of a linear: Infinity where its output is exact, null where nobody knows it.
const sqnr = i => L.exact[i] ? Infinity : L.sqnr[i];
const decibels = (x, unit = "") => x == null ? "–" : x === Infinity ? "exact" : x.toFixed(1) + unit;
const db = i => decibels(sqnr(i), " dB");

function bfloats(text) {
  const half = new Uint16Array(bytes(text).buffer), whole = new Uint32Array(half.length);
  half.forEach((x, i) => { whole[i] = x << 16; });
  return new Float32Array(whole.buffer);
}

let started = null;
const startVega = () => started ??= unpacked("vega-bundle").then(text => document.head.append(make("script", {}, `(function(){${text}\n})();`)));

const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim() || name;

function config() {
  const ink = color("ink"), muted = color("muted"), line = color("line");
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: null, font, aria: false, padding: { left: 2, right: 6, top: 2, bottom: 2 },
    view: { stroke: null },
    axis: { labelColor: muted, titleColor: ink, gridColor: line, gridOpacity: 0.75, domainColor: muted, tickColor: muted, labelFontSize: 11, titleFontSize: 12, titleFontWeight: 500, labelFlush: false },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 500 },
    axisX: { labelOverlap: true },
  };
}

// What is on the page: by box, how it is drawn (again, in another theme) and what frees it.
const drawn = new Map();

async function draw(box, kind, rows, words = {}, renderer = "svg", then = null) {
  const text = JSON.stringify(SPECS[kind]).replace(/@([a-z]\w*)/g, (_, name) => JSON.stringify(words[name] ?? (name === "dtype" ? DATA.dtype : color(name))).slice(1, -1));
  const spec = { ...JSON.parse(text), datasets: { rows } };
  if (words.height) spec.height = words.height;
  const old = drawn.get(box);
  drawn.set(box, { again: () => draw(box, kind, rows, words, renderer, then), free: null });
  old?.free?.();
  // vega names what it draws into in its own words; the box around that has ours
  const inside = make("div", { "aria-hidden": "true" });
  box.replaceChildren(inside);
  await startVega();
  if (!inside.isConnected) return; // another drawing has taken its place
  const result = await window.vegaEmbed(inside, spec, { actions: false, renderer, logLevel: 1, config: config(), tooltip: { theme: "custom" } });
  const entry = drawn.get(box);
  if (!entry) return result.finalize();
  entry.free = () => result.finalize();
  box.dataset.drawn = kind;
  if (then) then(result.view);
}

function forget(root) {
  for (const [box, entry] of drawn) if (root.contains(box)) { entry.free?.(); drawn.delete(box); }
}

const seen = new IntersectionObserver(entries => {
  for (const e of entries) if (e.isIntersecting) { seen.unobserve(e.target); e.target.start(); }
}, { rootMargin: "200px" });

// Draws when the box comes into view. ``label`` says in words what there is to see.
function lazily(box, label, start) {
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  box.start = start;
  seen.observe(box);
}

const isDark = () => document.documentElement.dataset.theme === "dark";
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light theme" : "Dark theme";
  for (const [box, entry] of [...drawn]) box.isConnected ? entry.again() : drawn.delete(box);
}
const wanted = matchMedia("(prefers-color-scheme: dark)");
setTheme(wanted.matches);
wanted.addEventListener("change", e => setTheme(e.matches));
$("theme").addEventListener("click", () => setTheme(!isDark()));
