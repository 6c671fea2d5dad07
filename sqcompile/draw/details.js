// What there is to read of a box.

const make = (tag, text, css) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (css) e.className = css;
  return e;
};

// The block of a copy among those of others: what differs between "model.layers.3" and "model.layers.4".
const lastPart = block => block.split(".").pop();

// place: the element. node: of the stage. copies: the nodes it stands for, by name. onGo(name): to one of them.
function showDetails(place, node, copies, onGo) {
  const many = Object.keys(copies).length > 1;
  place.replaceChildren(make("h2", (node.block && !many ? node.block + ": " : "") + node.label));
  for (const name of many ? [] : node.names) place.append(make("p", name));
  const differs = many ? termsThatDiffer(Object.values(copies)) : [];
  const list = make("dl");
  for (const [term, text] of node.facts) {
    if (many && Object.values(copies).some(c => !c.facts.some(f => f[0] === term && f[1] === text))) continue;
    list.append(make("dt", term), make("dd", text));
  }
  if (list.children.length) place.append(list);
  if (many) place.append(make("p", Object.keys(copies).length + " equal blocks; choose one to go to it:"), table(copies, differs, onGo));
  if (node.text) {
    place.append(make("h2", many ? `Operations of ${node.block}` : "Operations"));
    const code = make("pre", node.text);
    code.tabIndex = 0;
    code.setAttribute("role", "region");
    code.setAttribute("aria-label", "Operations");
    place.append(code);
  }
}

// The terms whose texts are short, and not the same in each.
function termsThatDiffer(nodes) {
  const terms = nodes[0].facts.map(([term]) => term);
  const text = (node, term) => (node.facts.find(f => f[0] === term) || ["", ""])[1];
  const own = (node, t) => t.replaceAll(node.block, "");
  return terms.filter((term, i) => terms.indexOf(term) === i)
    .filter(term => nodes.every(n => text(n, term).length <= 24))
    .filter(term => nodes.some(n => own(n, text(n, term)) !== own(nodes[0], text(nodes[0], term))));
}

function table(copies, terms, onGo) {
  const box = make("div", undefined, "sqd-many"), t = make("table"), head = make("tr");
  for (const term of ["block", ...terms]) {
    const cell = make("th", term);
    cell.scope = "col";
    head.append(cell);
  }
  t.append(head);
  for (const [name, node] of Object.entries(copies)) {
    const row = make("tr"), cell = make("td"), go = make("button", lastPart(node.block), "sqd-link");
    go.type = "button";
    go.setAttribute("aria-label", "go to " + node.block);
    go.addEventListener("click", () => onGo(name));
    cell.append(go);
    row.append(cell);
    for (const term of terms) row.append(make("td", (node.facts.find(f => f[0] === term) || ["", ""])[1]));
    t.append(row);
  }
  box.append(t);
  return box;
}
