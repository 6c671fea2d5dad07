// table: a line per linear; rows that are selected become overrides that leave them in float.
const total = L.loss.reduce((sum, x, i) => sum + (L.quantized[i] ? x ?? 0 : 0), 0);
const COLUMNS = [
  ["Linear", i => L.name[i], ""], ["Runs in", i => L.quantized[i] ? DATA.dtype : "float", ""], ["Smoothing", i => L.smoothing[i], ""],
  ["α", i => L.alpha[i], "num"], ["Rotation", i => L.rotation[i], "num"], ["SQNR, dB", sqnr, "num"],
  ["Cost", i => L.loss[i], "num"], ["Weight", i => L.shape[i].reduce((a, b) => a * b, 1), "num"], ["Why", i => DATA.reasons[L.reason[i]], ""],
];
const chosen = new Set();
let sorted = null, upwards = true;

function tableRow(i) {
  const name = plain(L.name[i]);
  const box = make("input", { type: "checkbox", "aria-label": `Select ${name}`, onchange: e => { e.target.checked ? chosen.add(i) : chosen.delete(i); row.classList.toggle("chosen", e.target.checked); selection(); } });
  box.checked = chosen.has(i);
  const cells = [
    L.site[i] < 0 ? make("span", {}, name) : make("button", { type: "button", title: "Show its site", onclick: () => show(L.site[i], true) }, name),
    make("span", { class: "kind" }, COLUMNS[1][1](i)), L.smoothing[i], L.alpha[i] == null ? "" : L.alpha[i].toFixed(2), L.rotation[i] ?? "",
    sqnr(i) == null ? "" : decibels(sqnr(i)), L.loss[i] == null ? "" : L.loss[i].toExponential(1),
    L.shape[i].join(" × "), DATA.reasons[L.reason[i]],
  ];
  const row = make("tr", { class: L.quantized[i] ? "" : "float", "data-layer": i }, make("td", {}, box),
    ...cells.map((c, k) => make("td", { class: k === 0 ? "name" : k === 8 ? "why" : COLUMNS[k][2] }, typeof c === "number" ? String(c) : c)));
  row.classList.toggle("chosen", chosen.has(i));
  return row;
}

function visible() {
  const text = $("filter").value.trim().toLowerCase(), kind = $("kind").value;
  const found = L.name.map((_, i) => i).filter(i => (kind === "" || String(L.quantized[i]) === kind)
    && (!text || `${L.name[i]} ${DATA.reasons[L.reason[i]]}`.toLowerCase().includes(text)));
  if (sorted == null) return found;
  const value = COLUMNS[sorted][1], sign = upwards ? 1 : -1;
  return found.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x == null || y == null) return (x == null) - (y == null) || a - b; // what is not known comes last either way
    return sign * (typeof x === "number" ? x - y || 0 : x.localeCompare(y, "en", { numeric: true })) || a - b;
  });
}

function table() {
  const found = visible();
  $("rows").replaceChildren(...found.map(tableRow));
  $("shown").textContent = `${found.length} of ${L.name.length}`;
  document.querySelectorAll("#head th[data-column]").forEach(th => {
    const mine = Number(th.dataset.column) === sorted;
    th.setAttribute("aria-sort", mine ? (upwards ? "ascending" : "descending") : "none");
  });
  selection();
}

const python = x => x === true ? "True" : x === false ? "False" : x == null ? "None"
  : Array.isArray(x) ? `(${x.map(python).join(", ")}${x.length === 1 ? "," : ""})`
  : typeof x === "object" ? `{${Object.entries(x).map(([k, v]) => `${python(k)}: ${python(v)}`).join(", ")}}` : JSON.stringify(x);

// A pattern that names one linear alone: its own characters are not those of a pattern, nor is it a part of another name.
function pattern(i) {
  const name = plain(L.name[i].split("#")[0]), text = name.replace(/[[*?]/g, "[$&]");
  const others = L.name.map(n => plain(n.split("#")[0])).filter(n => n !== name);
  return others.some(n => `.${n}.`.includes(`.${name}.`)) ? text.replace(/\w/, "[$&]") : text;
}

function overrides() {
  const fields = new Map(DATA.overrides);
  for (const i of [...chosen].sort((a, b) => a - b)) {
    const name = pattern(i), known = fields.get(name) ?? {};
    fields.delete(name); // what is said last counts
    fields.set(name, { ...known, skip: true });
  }
  const lines = [...fields].map(([k, v]) => `    ${python(k)}: ${python(v)},`);
  return `overrides={\n${lines.join("\n")}\n}`;
}

function selection() {
  const box = $("overrides"), copy = $("copy"), all = $("all");
  copy.disabled = box.hidden = !chosen.size;
  copy.textContent = chosen.size ? `Copy overrides (${chosen.size})` : "Copy overrides";
  box.value = chosen.size ? overrides() : "";
  const found = [...document.querySelectorAll("#rows tr")].map(r => Number(r.dataset.layer));
  all.checked = found.length > 0 && found.every(i => chosen.has(i));
  all.indeterminate = !all.checked && found.some(i => chosen.has(i));
}

$("head").append(
  make("th", { scope: "col" }, make("input", { type: "checkbox", id: "all", "aria-label": "Select all rows that are shown", onchange: e => {
    for (const r of document.querySelectorAll("#rows tr")) e.target.checked ? chosen.add(Number(r.dataset.layer)) : chosen.delete(Number(r.dataset.layer));
    table();
  } })),
  ...COLUMNS.map(([title, , css], k) => make("th", { scope: "col", class: css, "data-column": k, "aria-sort": "none" },
    make("button", { type: "button", onclick: () => { upwards = sorted === k ? !upwards : true; sorted = k; table(); } }, title))));
$("filter").addEventListener("input", table);
$("kind").addEventListener("change", table);
$("none").addEventListener("click", () => { chosen.clear(); table(); });
$("copy").addEventListener("click", async () => {
  const box = $("overrides");
  try {
    await navigator.clipboard.writeText(box.value);
  } catch { // without the permission, as for pages from a disk in some browsers
    box.select();
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
});
table();
