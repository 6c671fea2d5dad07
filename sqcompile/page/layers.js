// layers: all linears together: SQNR in the order of the model, and what costs most.
function bars() {
  const finite = L.sqnr.filter(x => x != null), most = finite.length ? Math.max(...finite) : 1;
  const rows = L.name.map((name, i) => ({
    place: i, end: i + (L.name.length < 200 ? 0.86 : 1), kind: L.quantized[i] ? DATA.dtype : "float", name: plain(name), site: L.site[i],
    db: L.quantized[i] ? L.exact[i] ? most : L.sqnr[i] : most, note: L.quantized[i] ? db(i) : "in float",
  })).filter(r => r.db != null);
  const low = L.name.map((_, i) => i).filter(i => sqnr(i) != null).sort((a, b) => sqnr(a) - sqnr(b) || 0);
  const count = some => L.name.filter((_, i) => some(i)).length;
  const floats = count(i => !L.quantized[i]), exact = count(i => L.exact[i]), unknown = count(i => L.quantized[i] && sqnr(i) == null);
  const full = [floats ? `${floats} in float` : "", exact ? `${exact} exact` : ""].filter(Boolean).join(", ");
  const words = low.length
    ? [`The lowest is ${db(low[0])}, of ${plain(L.name[low[0]])}; the median is ${db(low[low.length >> 1])}.`,
      full && `Bars over the whole height: ${full}.`, unknown && `Without a bar: ${unknown} in ${DATA.dtype} whose SQNR is not known.`].filter(Boolean).join(" ")
    : "The plan has no SQNR of its linears.";
  $("c-sqnr").textContent = words;
  if (low.length) lazily($("p-sqnr"), `SQNR of each linear. ${words}`, () => draw($("p-sqnr"), "sqnr", rows, {}, "svg", opens));
  else $("p-sqnr").remove();
}

function ranking() {
  const known = L.loss.some(x => x != null);
  // where nothing is known of the outputs, a linear's own relative error stands for it
  const cost = i => known ? L.loss[i] : L.sqnr[i] == null ? null : 10 ** (-L.sqnr[i] / 10);
  const order = L.name.map((_, i) => i).filter(i => cost(i) > 0).sort((a, b) => cost(b) - cost(a)).slice(0, 20);
  const rows = order.map(i => ({
    name: plain(L.name[i]), cost: cost(i), kind: L.quantized[i] ? DATA.dtype : "float", site: L.site[i],
    share: !L.quantized[i] ? "left in float" : known && total ? percent(cost(i) / total) : "not known",
  }));
  const unit = known ? (DATA.logits ? "cost, nats per output row" : "cost, half of the outputs' relative error energy") : "relative error energy of its own output";
  const share = known && total ? order.filter(i => L.quantized[i]).reduce((s, i) => s + cost(i), 0) / total : null;
  let words = rows.length ? `The ${rows.length} that cost most, ${known ? "by gradients" : "by their own error"}. First: ${rows[0].name}, ${number(rows[0].cost)}.` : "The plan has no costs.";
  if (share != null) words += ` Those of them in ${DATA.dtype} are ${percent(share)} of what all cost.`;
  const unknown = known ? L.name.filter((_, i) => L.quantized[i] && L.loss[i] == null).length : 0;
  if (unknown) words += ` What ${unknown} in ${DATA.dtype} cost is not known.`;
  if (rows.some(r => r.kind === "float")) words += " Those in float would cost so much.";
  $("c-ranking").textContent = words;
  if (rows.length) lazily($("p-ranking"), `Which linears cost most. ${words}`, () => draw($("p-ranking"), "ranking", rows, { unit, height: 20 * rows.length }, "svg", opens));
  else $("p-ranking").remove();
}

function opens(view) {
  view.addEventListener("click", (_, item) => { if (item?.datum?.site >= 0) show(item.datum.site, true); });
}

bars();
ranking();
for (const frame of document.querySelectorAll("iframe[data-page]")) { // the drawing, when one comes to it
  new IntersectionObserver((entries, me) => {
    if (!entries.some(e => e.isIntersecting)) return;
    me.disconnect();
    frame.srcdoc = JSON.parse($(frame.dataset.page).textContent);
  }, { rootMargin: "300px" }).observe(frame);
}
