// One drawing: it moves, zooms, and lets the keyboard go from box to box.

// onChoose(name), onRepeat(): what a click or Enter does. onHover(text or null, event)
function makePane(element, stage, {onChoose, onRepeat, onHover, onEnter}) {
  const canvas = element.querySelector(".sqd-canvas");
  const pointers = new Map();
  let svg, boxes, size, moved = false, pinch = 0;
  const view = {x: 0, y: 0, zoom: 1};

  // Where a box is in the drawing.
  const place = box => {
    const {x, y, width, height} = box.getBBox(), own = box.transform.baseVal.consolidate(), by = own ? own.matrix : {e: 0, f: 0};
    return {x: x + by.e, y: y + by.f, width, height};
  };
  const show = () => {
    const {clientWidth: w, clientHeight: h} = canvas;
    if (w && h) svg.setAttribute("viewBox", [view.x, view.y, w / view.zoom, h / view.zoom].join(" "));
  };
  const room = () => ({w: canvas.clientWidth || 1, h: canvas.clientHeight || 1});
  const limited = zoom => Math.min(6, Math.max(0.01, zoom));

  // Shows a rectangle in the middle of the pane, as large as it may be.
  function look({x, y, width, height}, most = 1.4) {
    const {w, h} = room();
    view.zoom = limited(Math.min(most, w / (width + 40), h / (height + 40)));
    view.x = x + width / 2 - w / view.zoom / 2;
    view.y = y + height / 2 - h / view.zoom / 2;
    show();
  }
  // The top of the drawing, its whole width.
  function start() {
    const {w, h} = room();
    view.zoom = limited(Math.min(1, w / size.width));
    view.x = (size.width - w / view.zoom) / 2;
    view.y = Math.min(0, (size.height - h / view.zoom) / 2);
    show();
  }
  function zoomAt(factor, cx = room().w / 2, cy = room().h / 2) {
    const next = limited(view.zoom * factor);
    view.x += cx / view.zoom - cx / next;
    view.y += cy / view.zoom - cy / next;
    view.zoom = next;
    show();
  }
  function move(dx, dy) {
    view.x -= dx / view.zoom;
    view.y -= dy / view.zoom;
    show();
  }
  // Moves no further than it must for a box to be seen whole, and near.
  function reveal(box) {
    const b = place(box), {w, h} = room();
    if (view.zoom < 0.45) return look({x: b.x - 150, y: b.y - 150, width: b.width + 300, height: b.height + 300}, 1);
    const edge = 30 / view.zoom, right = view.x + w / view.zoom, bottom = view.y + h / view.zoom;
    if (b.x >= view.x + edge && b.y >= view.y + edge && b.x + b.width <= right - edge && b.y + b.height <= bottom - edge) return;
    view.x = b.x + b.width / 2 - w / view.zoom / 2;
    view.y = b.y + b.height / 2 - h / view.zoom / 2;
    show();
  }

  const at = e => {
    const r = canvas.getBoundingClientRect();
    return [e.clientX - r.left, e.clientY - r.top];
  };
  const part = e => e.target.closest ? e.target.closest("[data-node], [data-repeat]") : null;
  canvas.addEventListener("wheel", e => {
    if (!onEnter.wheel(e)) return;
    e.preventDefault();
    const lines = e.deltaMode === 1 ? 30 : 1;
    zoomAt(Math.exp(-e.deltaY * lines / 500), ...at(e));
  }, {passive: false});
  canvas.addEventListener("pointerdown", e => {
    if (e.button) return;
    pointers.set(e.pointerId, [e.clientX, e.clientY]);
    moved = false;
    pinch = 0;
  });
  canvas.addEventListener("pointermove", e => {
    const from = pointers.get(e.pointerId);
    if (!from) return;
    const [dx, dy] = [e.clientX - from[0], e.clientY - from[1]];
    if (!moved && Math.hypot(dx, dy) < 4) return;
    if (!moved) canvas.setPointerCapture(e.pointerId);
    moved = true;
    onHover(null);
    pointers.set(e.pointerId, [e.clientX, e.clientY]);
    if (pointers.size === 1) return move(dx, dy);
    const [a, b] = [...pointers.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]), r = canvas.getBoundingClientRect();
    if (pinch) zoomAt(apart / pinch, (a[0] + b[0]) / 2 - r.left, (a[1] + b[1]) / 2 - r.top);
    pinch = apart;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, e => pointers.delete(e.pointerId));
  canvas.addEventListener("click", e => {
    const box = part(e);
    onEnter.focus();
    if (moved || !box) return;
    act(box);
  });
  canvas.addEventListener("dblclick", e => { if (!part(e)) start(); });
  canvas.addEventListener("pointerover", e => {
    const box = part(e);
    if (!pointers.size) onHover(box && box.getAttribute("aria-label"), e);
    light(box && box.dataset.node);
  });
  canvas.addEventListener("pointerleave", () => { onHover(null); light(null); });
  canvas.addEventListener("focusin", e => {
    const box = part(e);
    if (!box) return;
    if (box.dataset.node !== undefined) stop(box);
    if (box.matches(":focus-visible")) reveal(box);
    light(box.dataset.node);
  });
  canvas.addEventListener("focusout", () => light(null));
  canvas.addEventListener("keydown", e => {
    const box = part(e);
    if (!box || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "Enter" || e.key === " ") act(box);
    else if (!e.key.startsWith("Arrow") || !step(box, e.key.slice(5))) return;
    e.preventDefault();
    e.stopPropagation();
  });
  const act = box => box.dataset.node === undefined ? onRepeat() : onChoose(box.dataset.node);

  // The edges of a box, among the others.
  function light(name) {
    for (const g of svg.querySelectorAll("[data-from]"))
      g.classList.toggle("sqd-dim", name != null && g.dataset.from !== name && g.dataset.to !== name);
  }
  // The one box that the Tab key comes to.
  function stop(box) {
    for (const old of svg.querySelectorAll('[data-node][tabindex="0"]')) old.setAttribute("tabindex", "-1");
    if (box) box.setAttribute("tabindex", "0");
  }
  function step(box, way) {
    const middle = b => { const r = place(b); return [r.x + r.width / 2, r.y + r.height / 2]; };
    const [x, y] = middle(box), name = box.dataset.node;
    const others = [...svg.querySelectorAll("[data-node], [data-repeat]")].filter(b => b !== box).map(b => [b, ...middle(b)]);
    let found;
    if (way === "Left" || way === "Right") {
      const side = way === "Left" ? -1 : 1;
      found = others.filter(([, bx, by]) => Math.abs(by - y) < 12 && side * (bx - x) > 0).sort((p, q) => side * (p[1] - q[1]));
    } else {
      const [own, other] = way === "Down" ? ["from", "to"] : ["to", "from"];
      const near = new Set([...svg.querySelectorAll(`[data-${own}]`)].filter(g => g.dataset[own] === name).map(g => g.dataset[other]));
      found = others.filter(([b]) => near.has(b.dataset.node));
      if (!found.length) found = others.filter(([, , by]) => way === "Down" ? by > y : by < y);
      found.sort((p, q) => Math.hypot(p[1] - x, p[2] - y) - Math.hypot(q[1] - x, q[2] - y));
    }
    if (found.length) found[0][0].focus();
    return found.length > 0;
  }

  const pane = {
    element, stage, view, look, start, zoomAt, move, reveal, size: () => size,
    box: name => boxes.get(name),
    // Takes over the drawing that stands in the canvas, or a new one.
    draw(text) {
      if (text) canvas.innerHTML = text;
      onEnter.focus();  // the box that had it is gone
      svg = canvas.querySelector("svg");
      const {width, height} = svg.viewBox.baseVal;
      size = {x: 0, y: 0, width, height};
      svg.setAttribute("preserveAspectRatio", "xMinYMin");
      boxes = new Map([...svg.querySelectorAll("[data-node]")].map(b => [b.dataset.node, b]));
      for (const b of svg.querySelectorAll("[data-repeat]")) b.setAttribute("tabindex", "0");
      stop(boxes.values().next().value);
      start();
    },
    mark(css, names) {
      for (const b of svg.querySelectorAll("." + css)) b.classList.remove(css);
      for (const name of names) if (boxes.has(name)) boxes.get(name).classList.add(css);
    },
    // Shows all of some boxes.
    gather(names) {
      const found = names.map(n => boxes.get(n)).filter(Boolean).map(place);
      if (!found.length) return;
      const x = Math.min(...found.map(b => b.x)), y = Math.min(...found.map(b => b.y));
      const right = Math.max(...found.map(b => b.x + b.width)), bottom = Math.max(...found.map(b => b.y + b.height));
      look({x: x - 40, y: y - 40, width: right - x + 80, height: bottom - y + 80}, 1);
    },
    key(e) {
      if (e.key === "f") look(size);
      else if (e.key === "0") start();
      else if (e.key === "+" || e.key === "=") zoomAt(1.25);
      else if (e.key === "-") zoomAt(0.8);
      else if (e.key.startsWith("Arrow")) {
        const by = 80;
        move(...{Left: [by, 0], Right: [-by, 0], Up: [0, by], Down: [0, -by]}[e.key.slice(5)]);
      } else return false;
      return true;
    },
  };
  new ResizeObserver(() => show()).observe(canvas);
  return pane;
}
