// sites: one tensor and the linears that read it: its channels, tokens, candidates and codes.
const SITES = DATA.sites;
const lowest = s => {
  const known = s.linears.map(sqnr).filter(x => x != null);
  return known.length ? Math.min(...known) : null;
};
let open = -1;

function siteList() {
  const list = $("sitelist"), text = $("find").value.trim().toLowerCase();
  list.replaceChildren(...SITES.flatMap((s, i) => {
    if (text && !(s.label + " " + s.linears.map(k => L.name[k]).join(" ")).toLowerCase().includes(text)) return [];
    const low = lowest(s);
    const beside = L.quantized[s.linears[0]] ? decibels(low) : "float";
    return [make("li", {}, make("button", { type: "button", "data-site": i, "aria-current": String(i === open), onclick: () => show(i) },
      make("span", {}, s.label), make("span", {}, beside)))];
  }));
  if (!list.children.length) list.append(make("li", { class: "note" }, SITES.length ? "No site has such a name." : "None: the plan has no evidence."));
}

function show(i, scroll = false) {
  if (!SITES[i]) return;
  open = i;
  for (const b of document.querySelectorAll("#sitelist button")) b.setAttribute("aria-current", String(Number(b.dataset.site) === i));
  inList();
  const box = $("site");
  forget(box);
  box.replaceChildren(...panel(SITES[i], i));
  if (scroll) $("sites").scrollIntoView();
}

// Moves the list, and not the page, until the site that is open is seen in it.
function inList() {
  const b = document.querySelector('#sitelist button[aria-current="true"]')?.getBoundingClientRect(), list = $("sitelist").getBoundingClientRect();
  if (b && (b.top < list.top || b.bottom > list.bottom)) $("sitelist").scrollTop += b.top - list.top - (list.height - b.height) / 2;
}

function panel(s, i) {
  const first = s.linears[0], int = Boolean(L.quantized[first]);
  const [alpha, rotation] = [L.alpha[first], L.rotation[first]];
  const how = !int ? "float" : L.smoothing[first] === "none" ? "none" : `α ${alpha == null ? "?" : alpha.toFixed(2)}, ${L.smoothing[first]}`;
  const facts = [
    ["Smoothing", how], ["Rotation", rotation ? `blocks of ${rotation}` : "none"],
    ["Channels", s.channels.toLocaleString("en")], ["Calibration tokens", s.tokens ? s.tokens.toLocaleString("en") : "none"],
    ["Largest / median channel", int ? `${number(s.ratio[0])}x → ${number(s.ratio[1])}x` : `${number(s.ratio[0])}x`],
    ["Dead channels", `${s.dead}, nearly silent ${s.silent}`],
    ["Clipped values", percent(s.clipped)], ["Rounded to zero", percent(s.zeros)],
  ];
  const head = make("div", { class: "card" },
    make("div", { class: "sitehead" }, make("h3", {}, s.label), make("div", {},
      make("button", { type: "button", disabled: i === 0, onclick: () => show(i - 1) }, "Previous"),
      make("button", { type: "button", disabled: i === SITES.length - 1, onclick: () => show(i + 1) }, "Next"))),
    make("ul", { class: "floats mono" }, ...s.linears.map(k => make("li", {}, `${plain(L.name[k])}: ${L.quantized[k] ? db(k) : "float"}`))),
    s.spikes ? make("p", {}, make("span", { class: "tag look" }, "Spikes"), ` ${s.spikes}`) : null,
    s.undivided.length ? make("p", {}, make("span", { class: "tag look" }, "Edited"),
      ` ${s.undivided.map(k => plain(L.name[k])).join(", ")}: the weight absorbed 1/s of a site that was dropped when the plan was edited. Weights after smoothing, their codes and SQNR are of before.`) : null,
    make("ul", { class: "facts" }, ...facts.map(([k, v]) => make("li", {}, make("span", {}, k), v))));
  const plots = make("div", { class: "plots" }, ...channels(s, int, rotation), ...heats(s, int), ...curve(s, alpha, rotation), ...codes(s));
  return [head, plots, largest(s, int, rotation)];
}

function figure(title, words, kind, rows, more = {}, renderer = "svg") {
  const box = make("div", { class: "plot tall" });
  lazily(box, `${title}. ${words}`, () => draw(box, kind, rows, more, renderer));
  return make("div", { class: "card" }, make("figure", {}, make("h3", {}, title), make("figcaption", {}, words), box));
}

function channels(s, int, rotation) {
  const every = bfloats(s.absmax), n = every.length / 4;
  const median = s.ratio[0] ? s.values[0][0] / s.ratio[0] : 0;
  const spiky = s.largest.map((c, k) => [c, k]).filter(([, k]) => median > 0 && s.values[0][k] >= 5 * median);
  return [["Activations", 0], ["Weights", 2]].map(([title, row]) => {
    const rows = [];
    for (const [when, offset] of int ? [["before", 0], ["after", 1]] : [["before", 0]]) {
      for (let b = 0; b < n; b++) {
        const value = every[(row + offset) * n + b];
        if (value > 0) rows.push({ kind: "line", when, channel: b * s.width, value });
      }
      if (row === 0 && !(rotation && offset))
        for (const [channel, k] of spiky) if (s.values[offset][k] > 0) rows.push({ kind: "outlier", when, channel, value: s.values[offset][k] });
    }
    if (row === 0) for (const [b, count] of s.deadAt)
      rows.push({ kind: "dead", channel: b * s.width, label: `${count} of channels ${b * s.width} to ${Math.min(s.channels, (b + 1) * s.width) - 1}` });
    const top = o => number(Math.max(...every.subarray((row + o) * n, (row + o + 1) * n)));
    let words = `The largest is ${top(0)}${int ? ` before and ${top(1)} after` : ""}.`;
    if (row === 0) {
      words += spiky.length ? ` ▲ ${spiky.length} of the largest channels are 5 or more times the median.` : " No channel is 5 times the median.";
      if (s.dead) words += ` ✕ ${s.dead} dead.`;
      if (rotation) words += " After: of sampled tokens.";
    }
    if (s.width > 1) words += ` Buckets of ${s.width} channels.`;
    return figure(`${title}: largest value per channel`, words, "channels", rows);
  });
}

function heats(s, int) {
  if (!s.rows) return [make("p", { class: "card note" }, "No heat map: the calibration had no tokens.")];
  const every = bytes(s.heat), cols = every.length / s.rows / 2;
  const { depth, shear, octaves } = DATA.heat;
  return (int ? [["before", 0], ["after", 1]] : [["before", 0]]).map(([when, half]) => {
    const top = s.tops[half], rows = [];
    for (let t = 0; t < s.rows; t++) { // the token at the back first, so that those before it are drawn over it
      const back = (s.rows - 1 - t) / Math.max(1, s.rows - 1), base = depth * back;
      for (let c = 0; c < cols; c++) {
        const code = every[(half * s.rows + t) * cols + c], share = code ? 2 ** (-(255 - code) * octaves / 254) : 0;
        rows.push({ x: c * s.cells + shear * s.channels * back, base, top: base + Math.max(share, 0.004), value: Math.max(share, 2 ** -octaves) * top, channel: c * s.cells, token: t + 1 });
      }
    }
    const words = `${s.rows} sampled tokens, one behind the other, the largest at the back; height and colour are |x|, up to ${number(top)}.`;
    return figure(`Tokens and channels, ${when}`, words, "heat", rows, { channels: String(s.channels) }, "canvas");
  });
}

function curve(s, alpha, rotation) {
  if (!s.curve?.tried.some(t => t[2] === s.dynamic)) return [make("p", { class: "card note" }, "Nothing was tried here, so that there is no curve.")];
  const is = t => t[0] === alpha && t[1] === rotation && t[2] === s.dynamic;
  const shown = s.curve.tried.filter(t => t[2] === s.dynamic);
  const say = t => `${t[0] == null ? "no smoothing" : `α ${t[0]}`}, ${t[1] ? `rotated by ${t[1]}` : "not rotated"}`;
  const least = Math.min(...shown.map(t => t[3]).filter(x => x > 0), 1); // what costs nothing stands below, as 0 has no logarithm
  const rows = shown.map(t => ({ alpha: t[0] ?? -0.1, rotation: String(t[1] ?? "none"), cost: t[3] || least / 10, chosen: is(t), how: say(t) }));
  const chosen = shown.find(is), plainly = shown.find(t => t[0] == null && t[1] == null);
  let words = chosen ? `Chosen, with a ring: ${say(chosen)}, ${number(chosen[3])}.` : "What runs is none of these.";
  if (chosen && plainly && chosen !== plainly) words += ` Without smoothing and rotation: ${number(plainly[3])}.`;
  if (chosen && shown.some(t => t[3] < chosen[3]))
    words += " Some are lower: a rotation must pay for its additions, repeated layers stay alike, and smoothing guards against larger outliers than the sample has.";
  const unit = s.curve.loss ? (DATA.logits ? "cost, nats per output row" : "cost, of the outputs") : "relative error, summed";
  return [figure("What was tried", words, "curve", rows, { unit })];
}

function codes(s) {
  const rows = [], middle = (s.codes[0].length || s.codes[1].length) >> 1;
  const span = k => [(k - middle) * DATA.codes - (DATA.codes >> 1), (k - middle) * DATA.codes + (DATA.codes >> 1)];
  const words = [];
  ["activations", "weights"].forEach((what, w) => {
    const found = s.codes[w];
    found.forEach((share, k) => rows.push({ what, code: (k - middle) * DATA.codes, span: span(k).join(" to "), share }));
    const used = found.map((x, k) => x > 0 ? k : -1).filter(k => k >= 0);
    if (used.length) words.push(`${what} reach from ${span(used[0])[0]} to ${span(used[used.length - 1])[1]}`);
  });
  if (!rows.length) return [make("p", { class: "card note" }, "No codes: these linears run in float.")];
  const text = `Of sampled values ${words.join(", ")}${s.clipped == null ? "" : `; ${percent(s.clipped)} of activations are clipped, ${percent(s.zeros)} rounded to zero`}.`;
  return [figure(`Histogram of ${DATA.dtype} codes`, text, "codes", rows, { codes: DATA.dtype === "INT8" ? "INT8 code" : "value, 127 being the largest" })];
}

function largest(s, int, rotation) {
  const head = int ? ["channel", "activation before", "activation after", "weight before", "weight after"] : ["channel", "activation", "weight"];
  const columns = int ? [0, 1, 2, 3] : [0, 2];
  return make("details", { class: "card", style: "margin-top:1rem" },
    make("summary", {}, `The ${s.largest.length} largest channels in numbers`),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the largest channels", style: "margin-top:.6rem" }, make("table", {},
      make("thead", {}, make("tr", {}, ...head.map(h => make("th", { class: "num", scope: "col" }, h)))),
      make("tbody", {}, ...s.largest.map((c, k) => make("tr", {}, make("td", { class: "num" }, String(c)), ...columns.map(r => make("td", { class: "num" }, number(s.values[r][k])))))))),
    rotation ? make("p", { class: "note" }, "After a rotation a channel is a mixture of those of its block.") : null);
}

$("find").addEventListener("input", siteList);
siteList();
if (SITES.length) {
  const worst = SITES.map((s, i) => [lowest(s) ?? Infinity, i]).sort((a, b) => a[0] - b[0])[0][1];
  show(worst);
} else $("site").append(make("p", { class: "card note" }, "The plan has no evidence, so that there is nothing to draw here."));
